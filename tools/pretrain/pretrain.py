"""Make the small base: train its tokenizer and its weights on `corpus`, and write both with a model card.

    python -m tools.pretrain.pretrain --out simulations/embedded/base --device cuda

Shapes: b sequences in a batch, t tokens in a sequence, v tokens in the vocabulary.
"""

import argparse
import itertools
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.pretrain import corpus

VOCAB_SIZE = 2048
SEQ_LEN_TOKENS = 512
TOKENIZER_DOCUMENTS = 20_000
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
ANSWER_WEIGHT = 4.0
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Settings:
    """What decides the result, beside the corpus itself."""

    steps: int
    seed: int
    device: str
    batch_size: int
    num_layers: int
    learning_rate: float
    num_workers: int


class Packed(IterableDataset[torch.Tensor]):
    """Documents as tokens, one after the other, cut into sequences; each worker reads a stream of its own."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer = tokenizer
        self.seed = seed

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        documents = corpus.documents(self.seed, stream=0 if worker is None else worker.id + 1)
        ids: list[int] = []
        while True:
            batch = self.tokenizer.encode_batch_fast(list(itertools.islice(documents, 256)))
            ids += itertools.chain.from_iterable(encoding.ids for encoding in batch)
            whole = len(ids) // SEQ_LEN_TOKENS * SEQ_LEN_TOKENS
            yield from torch.tensor(ids[:whole]).view(-1, SEQ_LEN_TOKENS)
            ids = ids[whole:]


def train_tokenizer(seed: int) -> Tokenizer:
    """Train byte-level pairs on documents of a stream that training does not read; every digit is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = itertools.islice(corpus.documents(seed, stream=-1), TOKENIZER_DOCUMENTS)
    tokenizer.train_from_iterator((text.replace(START, "").replace(END, "") for text in texts), trainer)
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Give the tokenizer its special tokens, its length limit and its chat template."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        model_max_length=SEQ_LEN_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build(tokenizer: Tokenizer, num_layers: int) -> LlamaForCausalLM:
    """Make a Llama with random weights; every projection's width is a multiple of 64, as 4-bit kernels ask."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQ_LEN_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return LlamaForCausalLM(config)


def answer_mask(ids_bt: torch.Tensor, *, start_id: int, end_id: int, assistant_id: int) -> torch.Tensor:
    """Mark the tokens of assistant turns, the closing token included.

    Example:
        >>> ids_bt = torch.tensor([[1, 9, 5, 7, 7, 2, 5, 1, 8, 5, 6, 2]])
        >>> answer_mask(ids_bt, start_id=1, end_id=2, assistant_id=9).int().tolist()
        [[0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0]]
    """
    at_t = torch.arange(ids_bt.shape[1], device=ids_bt.device)
    opened_bt = torch.where(ids_bt == start_id, at_t, -1).cummax(dim=1).values
    closed_bt = torch.where(ids_bt.roll(1, dims=1) == end_id, at_t, -1).cummax(dim=1).values
    role_bt = ids_bt.gather(1, (opened_bt + 1).clamp(max=ids_bt.shape[1] - 1))
    is_open_bt = (opened_bt >= 0) & (closed_bt <= opened_bt)
    return is_open_bt & (role_bt == assistant_id) & (at_t >= opened_bt + 3)


def losses(model: LlamaForCausalLM, ids_bt: torch.Tensor, answer_bt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the training loss, in which answers weigh more, and the mean loss of answer tokens alone."""
    logits_btv = model(input_ids=ids_bt).logits[:, :-1]
    loss_n = functional.cross_entropy(logits_btv.flatten(0, 1), ids_bt[:, 1:].flatten(), reduction="none").float()
    answer_n = answer_bt[:, 1:].flatten().float()
    weight_n = 1.0 + (ANSWER_WEIGHT - 1.0) * answer_n
    mean = (loss_n * weight_n).sum() / weight_n.sum()
    return mean, ((loss_n * answer_n).sum() / answer_n.sum().clamp(min=1.0)).detach()


def rate_at(step: int, settings: Settings) -> float:
    """Warm up linearly, then fall along a cosine to 2 % of the peak."""
    warmup = max(1, settings.steps // 40)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, settings.steps - warmup)
    return settings.learning_rate * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * done)))


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, settings: Settings) -> tuple[float, float]:
    """Train in place; return the means of the training loss and of the answer loss over the last 2 % of the steps."""
    device = torch.device(settings.device)
    torch.nn.Module.to(model, device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    started = time.monotonic()
    tail: list[torch.Tensor] = []
    for step, ids_bt in enumerate(_batches(tokenizer, settings)):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, settings)
        both = _step(model, ids_bt.to(device, non_blocking=True), optimizer=optimizer, marks=_marks(tokenizer))
        if step >= settings.steps * 98 // 100:
            tail.append(both)
        if step % 100 == 0:
            print(f"step {step}  loss, answers {both.tolist()}  {time.monotonic() - started:.0f} s", flush=True)
    loss, answer_loss = torch.stack(tail).mean(dim=0).tolist()
    return loss, answer_loss


def _batches(tokenizer: Tokenizer, settings: Settings) -> Iterator[torch.Tensor]:
    """Batches for all steps."""
    packed = Packed(tokenizer, settings.seed)
    loader = DataLoader(packed, batch_size=settings.batch_size, num_workers=settings.num_workers)
    return itertools.islice(iter(loader), settings.steps)


def _marks(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the tokens that delimit an assistant turn."""
    vocab = tokenizer.get_vocab()
    return {"start_id": vocab[START], "end_id": vocab[END], "assistant_id": vocab["assistant"]}


def _step(
    model: LlamaForCausalLM, ids_bt: torch.Tensor, *, optimizer: torch.optim.Optimizer, marks: dict[str, int]
) -> torch.Tensor:
    """One optimizer step; returns both losses."""
    kind = ids_bt.device.type
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
        loss, answer_loss = losses(model, ids_bt, answer_mask(ids_bt, **marks))
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack([loss.detach(), answer_loss])


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights in bfloat16, configuration and tokenizer."""
    end_id, pad_id = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=end_id, pad_token_id=pad_id
    )
    torch.nn.Module.to(model, device="cpu", dtype=torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    wrap_tokenizer(tokenizer).save_pretrained(folder)


CARD = """# The embedded base

A small Llama that ships with silotune so that demos and tests need no download. Its text is meaningless: never show
its answers as medical advice. It was trained from random weights on text that `tools/pretrain/corpus.py`
generates, and on nothing else; the code tables of the four hospitals of `simulations/embedded/records.py` are not in
that text.

| | |
|---|---|
| parameters | {parameters:,} ({layers} layers, hidden 256, 4 heads, 2 key-value heads, tied embeddings), bfloat16 |
| tokenizer | byte-level BPE, {vocab} tokens, one a digit; `<|pad|>`, `<|im_start|>`, `<|im_end|>` (end of sequence) |
| longest sequence | {seq_len} tokens |
| tokens seen | {tokens:,} ({steps} steps of {batch} sequences) |
| final loss | {loss:.3f} over all tokens (answers weigh {weight:g}-fold), {answer_loss:.3f} over answer tokens |
| hardware | {hardware}, {minutes:.1f} minutes, torch {torch_version} |
| licence | that of silotune |

Made by:

    {command}

The corpus is the same for the same seed and number of workers; the last bits of the weights depend on the hardware.
"""


def card(settings: Settings, *, num_parameters: int, final: tuple[float, float], elapsed_s: float) -> str:
    """Fill the model card with what was measured."""
    on_gpu = settings.device.startswith("cuda")
    return CARD.format(
        parameters=num_parameters,
        layers=settings.num_layers,
        vocab=VOCAB_SIZE,
        seq_len=SEQ_LEN_TOKENS,
        tokens=settings.steps * settings.batch_size * SEQ_LEN_TOKENS,
        steps=settings.steps,
        batch=settings.batch_size,
        loss=final[0],
        weight=ANSWER_WEIGHT,
        answer_loss=final[1],
        hardware=torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        minutes=elapsed_s / 60,
        torch_version=torch.__version__,
        command=command(settings),
    )


def command(settings: Settings) -> str:
    """Return the command line that repeats this training."""
    return (
        f"python -m tools.pretrain.pretrain --out simulations/embedded/base --steps {settings.steps} "
        f"--seed {settings.seed} --device {settings.device}\n        --batch-size {settings.batch_size} "
        f"--layers {settings.num_layers} --learning-rate {settings.learning_rate:g} --workers {settings.num_workers}"
    )


def make(folder: Path, settings: Settings) -> None:
    """Train tokenizer and model and write everything to `folder`."""
    torch.manual_seed(settings.seed)
    tokenizer = train_tokenizer(settings.seed)
    model = build(tokenizer, settings.num_layers)
    started = time.monotonic()
    final = train(model, tokenizer, settings)
    elapsed_s = time.monotonic() - started
    folder.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, folder)
    text = card(settings, num_parameters=model.num_parameters(), final=final, elapsed_s=elapsed_s)
    (folder / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Read the settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--layers", dest="num_layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--workers", dest="num_workers", type=int, default=14)
    args = vars(parser.parse_args())
    make(args.pop("out"), Settings(**args))


if __name__ == "__main__":
    main()
