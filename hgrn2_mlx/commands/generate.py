"""``hgrn2 generate``: write text, perhaps going on from the state after an earlier text."""

import argparse
import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .arguments import example
from .passed_on import PassingParser, require_model, run_mlx_lm

# Those of mlx-lm's flags that say how a prompt is read, by their names in its functions.
READING = ("prefill_step_size", "kv_bits", "kv_group_size", "quantized_kv_start")


def build_parser() -> argparse.ArgumentParser:
    parser = PassingParser(
        **example(
            '--model hgrn2-1.3b --prompt "The history of the lighthouse" --max-tokens 200\n'
            "  %(prog)s --model hgrn2-1.3b --prompt - --max-tokens 0 "
            "--save-state book.safetensors < book.txt\n"
            "  %(prog)s --model hgrn2-1.3b --load-state book.safetensors "
            '--prompt "In the end,"'
        )
    )
    parser.add_argument("--model", help="folder or Hub repository id")
    parser.add_argument("--prompt", "-p", help="what to read first; - reads standard input")
    states = parser.add_argument_group(
        "saved states", "Prompts are then read as they stand, without a chat template."
    )
    states.add_argument(
        "--save-state",
        metavar="FILE",
        help="write the state after the prompt to a .safetensors file (--max-tokens 0: no more)",
    )
    states.add_argument(
        "--load-state",
        metavar="FILE",
        help="begin with the state in this file: as if its text came before the prompt",
    )
    return parser


def run(options: argparse.Namespace) -> None:
    require_model(options)
    prompt = () if options.prompt is None else (f"--prompt={options.prompt}",)
    if not (options.save_state or options.load_state):
        run_mlx_lm("generate", options, *prompt)
        return
    if not prompt:
        raise ValueError("--save-state and --load-state need --prompt")
    for flag in ("--prompt-cache-file", "--draft-model", "--image", "--system-prompt"):
        if any(argument.split("=")[0] == flag for argument in options.passed_on):
            raise ValueError(f"{flag} does not go with --save-state and --load-state")
    with _states(options.load_state, options.save_state):
        run_mlx_lm("generate", options, *prompt, "--ignore-chat-template")


@contextmanager
def _states(load: str | None, save: str | None) -> Iterator[None]:
    """A block in which mlx-lm's command begins with one state and saves another."""
    from ..saved_state import check_name

    if load:
        Path(load).stat()  # Before the model is loaded, and before a long text is read.
    if save:
        check_name(save)
        if not Path(save).absolute().parent.is_dir():
            raise ValueError(f"cannot write {save}: there is no such folder")

    # By its name, as the attribute generate of mlx_lm is a function.
    program: Any = importlib.import_module("mlx_lm.generate")
    generate = program.generate
    program.generate = _generate_between(load, save, generate)
    try:
        yield
    finally:
        program.generate = generate


def _generate_between(
    load: str | None, save: str | None, generate: Callable[..., str]
) -> Callable[..., str]:
    """mlx-lm's ``generate``, which its command calls, with the states before and after."""
    from mlx_lm.models.cache import make_prompt_cache

    from ..saved_state import load_state, save_state

    def generate_between(
        model: Any, tokenizer: Any, prompt: list[int], max_tokens: int, **settings: Any
    ) -> str:
        cache, read = load_state(load, model) if load else (make_prompt_cache(model), 0)
        if load and prompt[:1] == [tokenizer.bos_token_id]:
            prompt = prompt[1:]  # The text goes on.
        if not prompt:
            raise ValueError("the prompt is empty")
        if save:
            how = {name: settings[name] for name in READING}
            read += len(prompt)
            _read(model, prompt[:-1], cache, how)
            prompt = prompt[-1:]
            after = copy.deepcopy(cache)  # As generating reads the last token itself.
            _read(model, prompt, after, how)
            save_state(save, after, model, read)
            print(f"state after {read:,} tokens written to {save}", file=sys.stderr)
        if max_tokens == 0:
            return ""
        settings["prompt_cache"] = cache
        return generate(model, tokenizer, prompt, max_tokens=max_tokens, **settings)

    return generate_between


def _read(model: Any, prompt: list[int], cache: list[Any], how: dict[str, Any]) -> None:
    """Brings ``cache`` to where it is after ``prompt``."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    if prompt:
        for _ in generate_step(mx.array(prompt), model, max_tokens=0, prompt_cache=cache, **how):
            pass
