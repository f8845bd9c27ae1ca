import pytest

ALIASES = "\n".join(
    f"    {name}: &{name} [{', '.join([f'*{before}'] * 9)}]"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BOMBS = {
    f"    a: &a [{', '.join('x' * 9)}]\n{ALIASES}": "with its aliases it has 490,329,071 values",
    "    a: &a [*a]": "with its aliases it has infinitely many values, at most 250,000",
    f"    a: {'[' * 5000}{']' * 5000}": "it is nested too deeply",
}


@pytest.mark.parametrize("below", BOMBS, ids=["aliases", "recursion", "nesting"])
def test_a_file_that_a_few_aliases_make_endless_is_refused_by_its_name(kvpipe, tmp_path, below):
    path = tmp_path / "conf/pipeline/bomb.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"# @package _global_\npipeline: [jax_ready]\nphases:\n  jax_ready:\n{below}\n")
    answer = kvpipe("check", "--config-dir", str(path.parents[1]), "pipeline=bomb")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"kvpipe: {path}, line ")
    assert BOMBS[below] in answer.err
    assert answer.err.count("\n") == 1


def test_aliases_that_say_a_thing_once_are_no_bomb(kvpipe, tmp_path):
    path = tmp_path / "conf/pipeline/aliased.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(
        "# @package _global_\npipeline: [jax_ready, a, b]\nphases:\n"
        "  a: &same {use: jax_ready}\n  b: *same\n"
    )
    answer = kvpipe("check", "--config-dir", str(path.parents[1]), "pipeline=aliased")
    assert (answer.code, answer.out) == (0, "tiny: 3 steps, their order holds\n")
