"""Prompt and outputs of a run as W&B shows them: names, truncated texts, summary keys.

Only phases that generate with ``log_text`` count. Code that needs wandb must not be here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvpipe.records.run import PhaseRecord

TABLE_COLUMNS = ("kind", "sha256", "chars", "truncated", "text")
_SUMMARY_NAMES = {
    "output_1": "sample/output_text",
    "output_2": "sample/output_text_after_rebuild",
}


@dataclass(frozen=True)
class Sample:
    """A text of the run, with the SHA-256 of its UTF-8 bytes.

    ``kind`` is ``prompt``, or ``output_<n>`` for the n-th output from 1.
    """

    kind: str
    text: str
    sha256: str

    @property
    def key(self) -> str:
        """Media key of the text."""
        kind, _, number = self.kind.partition("_")
        return f"sample_output_text_{number}" if number else f"sample_{kind}"

    @property
    def file_name(self) -> str:
        """Name of the file with the whole text."""
        return f"{self.kind}_sha256_{self.sha256}.txt"

    def shown(self, max_chars: int) -> str:
        """Return the part of the text shown in media and tables."""
        return self.text[:max_chars]

    def sizes(self, max_chars: int) -> dict[str, int | bool]:
        """Return the metrics for the text's length and whether it is truncated."""
        return {
            f"{self.key}_chars": len(self.text),
            f"{self.key}_truncated": len(self.text) > max_chars,
        }

    def row(self, max_chars: int) -> list[Any]:
        """Return the row of the table of texts, in the order of :data:`TABLE_COLUMNS`."""
        return [self.kind, self.sha256, *self.sizes(max_chars).values(), self.shown(max_chars)]


def new_samples(record: PhaseRecord, earlier: Sequence[Sample]) -> list[Sample]:
    """Return the texts that ``record`` adds to the earlier ones: its output, first the prompt."""
    fields = record.fields
    if not fields.get("log_text") or "text" not in fields:
        return []
    # `earlier` is the prompt and then the outputs, so its length is the number of the next output.
    output = Sample(f"output_{len(earlier) or 1}", fields["text"], fields["text_sha256"])
    if earlier:
        return [output]
    return [Sample("prompt", fields["prompt"], fields["prompt_sha256"]), output]


def summary_of(sample: Sample, prompt_file: str | None) -> dict[str, Any]:
    """Return the summary keys that a text sets; outputs after the second set none."""
    if sample.kind == "prompt":
        return {
            "prompt/chars": len(sample.text),
            "prompt/file": prompt_file,
            "sample/prompt_sha256": sample.sha256,
        }
    if (name := _SUMMARY_NAMES.get(sample.kind)) is None:
        return {}
    length = len(sample.text)
    return {f"{name}_sha256": sample.sha256, name: sample.text, f"{name}_chars": length}
