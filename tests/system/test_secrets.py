import json
from urllib.parse import quote

import pytest

from kvpipe.errors import InputError
from kvpipe.system.secrets import known_secrets, redactor, refuse_secrets, wandb_api_key

KEY = "a1b2" * 10
TOKEN = "hf_" + "t0ken" * 6


def write_env(directory, content, mode=0o600):
    path = directory / ".env"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(mode)
    return path


def test_the_environment_comes_first(tmp_path):
    write_env(tmp_path, "WANDB_API_KEY=other", mode=0o644)
    assert wandb_api_key(tmp_path, {"WANDB_API_KEY": f" {KEY}\n"}) == KEY


def test_without_a_key_anywhere_there_is_none(tmp_path):
    assert wandb_api_key(tmp_path, {}) is None
    write_env(tmp_path, "# nothing\n\nWANDB_MODE=online\nWANDB_API_KEY=\n")
    assert wandb_api_key(tmp_path, {"WANDB_API_KEY": " "}) is None


@pytest.mark.parametrize(
    "line",
    [
        "WANDB_API_KEY={}",
        "export WANDB_API_KEY={}",
        "  WANDB_API_KEY = {}  ",
        'WANDB_API_KEY="{}"',
        "WANDB_API_KEY='{}' # mine",
        "WANDB_API_KEY={} # mine",
        "\ufeffWANDB_API_KEY={}",
        "WANDB_API_KEY={}\r",
    ],
)
def test_the_usual_ways_to_write_a_key_are_understood(tmp_path, line):
    write_env(tmp_path, f"# keys\nHF_HOME=/data # disk\n{line.format(KEY)}\n")
    if line.startswith("\ufeff"):
        write_env(tmp_path, line.format(KEY))
    assert wandb_api_key(tmp_path, {}) == KEY


def test_a_hash_inside_a_value_is_part_of_it(tmp_path):
    write_env(tmp_path, 'WANDB_API_KEY="a#b # c"')
    assert wandb_api_key(tmp_path, {}) == "a#b # c"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o601])
def test_a_file_that_others_may_touch_is_refused(tmp_path, mode):
    path = write_env(tmp_path, f"WANDB_API_KEY={KEY}", mode)
    with pytest.raises(InputError) as caught:
        wandb_api_key(tmp_path, {})
    assert str(caught.value) == (
        f"{path}: its mode is {mode:03o}, so others may read or change the keys in it; "
        f"run: chmod 600 {path}"
    )


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_file_of_the_owner_alone_is_read(tmp_path, mode):
    write_env(tmp_path, f"WANDB_API_KEY={KEY}", mode)
    assert wandb_api_key(tmp_path, {}) == KEY


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"WANDB_API_KEY {KEY}", "it must be KEY=VALUE"),
        (f"{KEY}", "it must be KEY=VALUE"),
        (f"1KEY={KEY}", "it must be KEY=VALUE"),
        (f'WANDB_API_KEY="{KEY}', "quotes must be closed"),
        (f'WANDB_API_KEY="{KEY}" {KEY}', "quotes must be closed"),
    ],
)
def test_a_malformed_line_is_named_by_number_and_not_shown(tmp_path, line, reason):
    path = write_env(tmp_path, f"A=1\n\n{line}\n")
    with pytest.raises(InputError, match=reason) as caught:
        wandb_api_key(tmp_path, {})
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert KEY not in str(caught.value)


def test_a_file_that_is_not_utf_8_is_refused_without_showing_it(tmp_path):
    write_env(tmp_path, b"WANDB_API_KEY=a1b2\xff")
    with pytest.raises(InputError, match="not UTF-8 at byte 18") as caught:
        wandb_api_key(tmp_path, {})
    assert "a1b2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_config_without_secrets_passes():
    engine = {"max_total_tokens": 4096, "max_new_tokens": 64, "random_seed": 0}
    config = {"engine": engine, "hf_token": None, "text": "my token", "list": [1, "a"], "map": {}}
    refuse_secrets(config, redactor({}, KEY))


@pytest.mark.parametrize(
    "name", ["api_key", "wandb_api_key", "HF_TOKEN", "token", "password", "private-key", "secret"]
)
def test_an_option_that_is_named_like_a_secret_is_refused(name):
    with pytest.raises(InputError, match=rf"^phases\.a\.{name}: this looks like a secret"):
        refuse_secrets({"phases": {"a": {name: "x"}}}, redactor({}, None))


def test_a_number_under_such_a_name_is_a_misspelled_option_and_no_secret():
    refuse_secrets({"phases": {"generate": {"max_new_token": 8}}}, redactor({}, None))


def test_the_key_itself_is_refused_wherever_it_is():
    with pytest.raises(
        InputError, match=r"^tracking\.tags\[1\]: .* variable WANDB_API_KEY,"
    ) as caught:
        refuse_secrets({"tracking": {"tags": ["a", f"key={KEY}"]}}, redactor({}, KEY))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("empty", [{}, [], None, 8])
def test_a_secret_in_a_key_is_refused_and_not_shown(empty):
    redact = redactor({"HF_TOKEN": TOKEN}, None)
    with pytest.raises(InputError, match=r"^phases\.a_\[redacted\]: .* variable HF_TOKEN,"):
        refuse_secrets({"phases": {f"a_{TOKEN}": empty}}, redact)


def test_a_reference_to_a_secret_is_refused_like_its_value():
    """Hydra resolves it only where it is used, for example in the name of a directory."""
    redact = redactor({"HF_TOKEN": TOKEN}, None)
    assert redact.variable_in("outputs/${oc.env: HF_TOKEN}") == "HF_TOKEN"
    assert redact.variable_in("${oc.env:HF_TOKEN_PATH} ${my_oc.env:HF_TOKENS}") is None


@pytest.mark.parametrize(
    ("variable", "value", "secret"),
    [
        ("GITHUB_PAT", "ghp_123456", "ghp_123456"),
        ("OPENAI_API_KEY", "sk-proj-1", "sk-proj-1"),
        ("STORAGE_KEY", TOKEN, TOKEN),
        ("APIKEY", "abcdefgh1", "abcdefgh1"),
        ("AWS_SECRET_ACCESS_KEY", f" {TOKEN}\n", TOKEN),
        ("client_secret", "x1234567", "x1234567"),
        ("DB_PASSWORD", "hunter2-hunter2", "hunter2-hunter2"),
        ("MYSQL_PWD", "hunter2-hunter2", "hunter2-hunter2"),
        ("SSH_PASSPHRASE", "correct horse battery staple", "correct horse battery staple"),
        ("HTTPS_PROXY", "http://me:hunter2-hunter2@proxy:80", "hunter2-hunter2"),
    ],
)
def test_a_variable_is_a_secret_by_its_name_or_as_the_password_of_a_url(variable, value, secret):
    forms = (secret, quote(secret, safe=""))
    assert redactor({variable: value}, None).secrets == dict.fromkeys(forms, variable)


def test_a_secret_is_found_as_a_url_writes_it_and_as_it_is_if_a_url_has_it():
    token = redactor({"MY_TOKEN": "a1/b2+c3=d4"}, None)
    assert token.variable_in("https://host?token=a1%2Fb2%2Bc3%3Dd4") == "MY_TOKEN"
    password = redactor({"DB": "postgres://me:p%40ss1word@host/db"}, None)
    assert password.variable_in("it is p@ss1word") == "DB"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HF_TOKEN_PATH", TOKEN),
        ("MONKEY", TOKEN),
        ("PWD", "/home/me/a/directory/of/2026"),
        ("MY_TOKEN", "1"),
        ("MY_TOKEN", "test"),
        ("MY_TOKEN", "bfloat1"),
        ("MY_TOKEN", "kv_cache_dropped"),
        ("MY_TOKEN", "17179869184"),
        ("MY_TOKEN", ""),
        ("HTTP_PROXY", "http://proxy:8080/a@b"),
    ],
)
def test_a_short_value_a_word_and_a_number_are_not_looked_for(variable, value):
    """They would match in any text: a record could not be written without being damaged."""
    assert redactor({variable: value}, None).secrets == {}


def test_the_key_of_a_dot_env_counts_if_a_run_would_read_it(tmp_path):
    write_env(tmp_path, f"WANDB_API_KEY={KEY}")
    assert known_secrets(tmp_path, {}, online=True).secrets == {KEY: "WANDB_API_KEY"}
    assert known_secrets(tmp_path, {}, online=False).secrets == {}
    (tmp_path / ".env").chmod(0o644)
    assert known_secrets(tmp_path, {}, online=True).secrets == {}


def test_the_secrets_of_the_environment_are_taken_out_of_a_text_and_of_json():
    redact = redactor({"HF_TOKEN": TOKEN, "PATH": "/usr/bin/and/more/than/that"}, KEY)
    assert redact.text(f"{KEY} and {TOKEN}, /usr/bin/and/more/than/that") == (
        "[redacted] and [redacted], /usr/bin/and/more/than/that"
    )
    quoted = 'a "secret" of\nmore than 20 characters'
    redact = redactor({"MY_PASSWORD": quoted}, None)
    assert json.loads(redact.text(json.dumps({"error": quoted}))) == {"error": "[redacted]"}


def test_a_short_value_is_no_secret_to_be_looked_for():
    assert redactor({"MY_TOKEN": "offline"}, None).text("mode: offline") == "mode: offline"


def test_a_secret_within_another_leaves_no_rest():
    redact = redactor({"A_TOKEN": TOKEN, "B_TOKEN": f"{TOKEN}-and-more"}, None)
    assert redact.text(f"{TOKEN}-and-more") == "[redacted]"


def test_a_file_is_written_anew_only_if_a_secret_is_in_it(tmp_path):
    log = tmp_path / "engine.log"
    redact = redactor({"HF_TOKEN": TOKEN}, None)
    redact.file(log)
    assert not log.exists()
    log.write_bytes(b"\xff plain")
    before = log.stat().st_mtime_ns
    redact.file(log)
    assert log.stat().st_mtime_ns == before
    log.write_bytes(b"\xff " + TOKEN.encode())
    redact.file(log)
    assert log.read_bytes() == b"\xff [redacted]"
