"""The model card of a converted folder, for the Hub."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .report import ConversionReport, readable_size


def model_card(report: ConversionReport, repository: str) -> str:
    """The text of ``README.md``: where the model comes from, its licence, what was done to it.

    Licence and language are those of the source's own card, if it has one.

    Args:
        report: Of the conversion.
        repository: The id under which the folder is uploaded.
    """
    original = _card_beside(report.source)
    data = ModelCardData(
        base_model=report.repository,
        base_model_relation="quantized" if report.quantization and report.repository else None,
        language=original.language,
        library_name="mlx" if report.framework == "mlx" else "transformers",
        license=original.license,
        license_name=original.license_name,
        license_link=original.get("license_link"),
        pipeline_tag="text-generation",
        tags=["hgrn2"] + (["mlx"] if report.framework == "mlx" else []),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_text(report, repository)}"


def _card_beside(source: Path) -> ModelCardData:
    folder = source.parent if source.is_file() else source
    try:
        return ModelCard.load(folder / "README.md").data
    except (OSError, ValueError):  # None, or none that the Hub would understand.
        return ModelCardData()


def _text(report: ConversionReport, repository: str) -> str:
    source = "a local checkpoint"
    if report.repository:
        source = f"[{report.repository}](https://huggingface.co/{report.repository})"
        source += f" (commit {report.commit})"
    weights = sorted({output.dtype for record in report.tensors for output in record.outputs})
    stored = ", ".join(weights)
    if report.quantization:
        bits, group = report.quantization["bits"], report.quantization["group_size"]
        mode = report.quantization["mode"]
        stored = f"{bits} bits in groups of {group} ({mode}); the rest {stored}"
    layers = ", ".join(f"{count} {kind}" for kind, count in report.layers.items() if count)
    versions = ", ".join(f"{package} {number}" for package, number in report.versions.items())
    return f"""# {repository.partition("/")[2]}

Made of {source} by `hgrn2 {_command(report)}`.

| | |
|---|---|
| parameters | {report.parameters:,} |
| layers | {layers} |
| weights | {stored} |
| size | {readable_size(report.size)} (source: {readable_size(report.source_size)}) |
| tokenizer | {report.tokenizer or "none"} |
| versions | {versions} |

{_usage(report, repository)}"""


def _command(report: ConversionReport) -> str:
    return "convert" if report.framework == "mlx" else "convert --to-pytorch"


def _usage(report: ConversionReport, repository: str) -> str:
    if report.framework == "mlx":
        return f"""```sh
pip install hgrn2-mlx
hgrn2 generate --model {repository} --prompt "The history of the lighthouse"
```
"""
    return f"""```python
import fla  # pip install flash-linear-attention
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repository}")
```
"""
