"""The comparison: one participant after the other, at the same sizes."""

from collections.abc import Sequence
from functools import partial

import mlx.core as mx

from ..machine import describe_machine
from .model_timing import measure_model
from .models import Subject
from .participant import Participant, Progress, Values
from .peers import find_peers
from .recurrences import measure_recurrence, recurrence_of
from .results import Results, Row
from .settings import QUANTITIES, Settings


def bench(
    subject: Subject,
    peers: Sequence[str] | None,
    settings: Settings,
    progress: Progress = lambda what: None,
) -> Results:
    """Measures the subject and its peers, which are as wide, as deep and of the same type.

    Args:
        subject: What to measure.
        peers: Names of ``PEERS``; ``None`` for all that are installed and can run here.
        settings: At what lengths and batch sizes.
        progress: Is told what is measured next.

    Raises:
        ValueError: If a peer is not installed, or cannot be measured here or at this size.
    """
    participants = [_participant(subject), *find_peers(subject, peers)]
    beside_recurrences = sum(x.recurrence is not None for x in participants) > 1
    measured = {
        participant.name: _measure(participant, beside_recurrences, settings, progress)
        for participant in participants
    }
    cases = sorted(measured[subject.name], key=lambda case: list(QUANTITIES).index(case[0]))
    return Results(
        machine=describe_machine() | {"device": mx.device_info()["device_name"]},
        dtype=str(subject.dtype).removeprefix("mlx.core."),
        quantization=subject.quantization,
        size=subject.size,
        parameters={x.name: x.parameters for x in participants},
        notes=_notes(participants, subject, cases, settings),
        settings=settings,
        rows=[
            Row(*case, {name: values[case] for name, values in measured.items() if case in values})
            for case in cases
        ],
    )


def _notes(
    participants: list[Participant],
    subject: Subject,
    cases: list[tuple[str, int, int]],
    settings: Settings,
) -> dict[str, str]:
    notes = {x.name: x.note for x in participants if x.note}
    if settings.train_tokens and not any(quantity == "training step" for quantity, *_ in cases):
        reason = "is quantized"
        if subject.quantization is None:
            reason = "with its gradients and AdamW's averages does not fit in memory"
        notes["training step"] = f"left out, as {subject.name} {reason}"
    return notes


def _participant(subject: Subject) -> Participant:
    return Participant(
        subject.name,
        partial(measure_model, subject.build, subject.quantization is not None),
        subject.parameters,
        recurrence_of(subject.args, subject.dtype),
    )


def _measure(
    participant: Participant, with_recurrence: bool, settings: Settings, progress: Progress
) -> Values:
    measured: Values = {}

    def named(what: str) -> None:
        progress(f"{participant.name}: {what}")

    if participant.measure:
        for values in participant.measure(settings, named):
            measured |= values
    if with_recurrence and participant.recurrence:
        for values in measure_recurrence(participant.recurrence, settings, named):
            measured |= values
    return measured
