import pytest
import torch

from client.train.loop import mean_gradient
from common.adapter import adapter
from common.model import varlen
from common.text import prompts
from tests import tiny

TOLERANCE = 1e-5  # of the largest value: two orders of summation in float32 differ by a tenth of it


@pytest.fixture(scope="module")
def rows(shared_engine):
    """Seven rows of unequal length."""
    found = prompts.encode_all(tiny.rows(7), shared_engine.tokenizer, max_length_tokens=64, too_long="error")[0]
    assert len({len(row.input_ids) for row in found}) > 1
    return found


@pytest.fixture
def ready(engine):
    """In training mode, with a B other than zero so that gradients reach A."""
    adapter.write(engine.model, {name: tensor + 0.02 for name, tensor in engine.initial.items()})
    engine.model.train()
    return engine


def take(engine) -> dict[str, torch.Tensor]:
    """The gradients, which are cleared."""
    found = {name: parameter.grad.clone() for name, parameter in adapter.parameters(engine.model).items()}
    engine.model.zero_grad()
    return found


def naive(engine, rows) -> tuple[float, dict[str, torch.Tensor]]:
    """Row by row, without padding: the mean over all answer tokens by autograd of one sum."""
    total, count = torch.zeros(()), 0
    for row in rows:
        logits_tv = engine.model(torch.tensor([row.input_ids])).logits[0]
        for t in range(1, len(row.input_ids)):
            if row.is_answer[t]:
                total = total - logits_tv[t - 1].log_softmax(-1)[row.input_ids[t]]
                count += 1
    (total / count).backward()
    return float(total.detach()) / count, take(engine)


def largest_difference(found, expected) -> float:
    """Beside the largest value."""
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) / largest


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 7, 100])
def test_the_gradient_is_that_of_the_mean_over_all_answer_tokens_for_any_cut(ready, rows, micro_batch_size):
    expected_loss, expected = naive(ready, rows)
    loss = float(mean_gradient(ready, rows, micro_batch_size=micro_batch_size))
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
    assert largest_difference(take(ready), expected) < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 40, 90, 10_000])
def test_a_cut_by_tokens_gives_the_same_gradient_and_holds_no_more_than_they(ready, rows, tokens):
    _, expected = naive(ready, rows)
    sizes = []
    counted = lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape)  # noqa: E731
    handle = ready.model.register_forward_pre_hook(counted, with_kwargs=True)
    mean_gradient(ready, rows, micro_batch_size=7, micro_batch_tokens=tokens)
    handle.remove()
    assert largest_difference(take(ready), expected) < TOLERANCE
    assert sum(size.numel() for size in sizes) == sum(len(row.input_ids) for row in rows)
    assert all(size.numel() <= max(tokens, max(len(row.input_ids) for row in rows)) for size in sizes)
    assert len(sizes) == {1: 7, 10_000: 1}.get(tokens, len(sizes))


def test_packed_rows_have_the_gradient_of_padded_ones(ready, rows):
    """In float32 to 1e-6, every tensor's largest difference beside its largest value."""
    assert varlen.traits_of(ready.model).can_pack
    mean_gradient(ready, rows, micro_batch_size=7)
    packed = take(ready)
    with tiny.padded(ready.model):
        mean_gradient(ready, rows, micro_batch_size=7)
    assert largest_difference(packed, take(ready)) < 1e-6


def test_control_a_mean_of_means_is_another_gradient(ready, rows):
    """What averaging each micro-batch's own mean would give, as the model's `.loss` does."""
    _, expected = naive(ready, rows)
    parts = [naive(ready, rows[start : start + 2])[1] for start in range(0, len(rows), 2)]
    mean = {name: sum(part[name] for part in parts) / len(parts) for name in expected}
    assert largest_difference(mean, expected) > 100 * TOLERANCE


def test_gradients_add_to_what_is_there(ready, rows):
    mean_gradient(ready, rows, micro_batch_size=7)
    once = take(ready)
    for _ in range(2):
        mean_gradient(ready, rows, micro_batch_size=7)
    assert largest_difference(take(ready), {name: 2 * tensor for name, tensor in once.items()}) < TOLERANCE


def test_the_order_of_rows_does_not_matter(ready, rows):
    mean_gradient(ready, rows, micro_batch_size=3)
    expected = take(ready)
    mean_gradient(ready, rows[::-1], micro_batch_size=3)
    assert largest_difference(take(ready), expected) < TOLERANCE


def test_padding_has_no_gradient(ready, rows):
    """A short row's gradient is the same alone and beside a long one."""
    short, long = min(rows, key=lambda row: len(row.input_ids)), max(rows, key=lambda row: len(row.input_ids))
    _, expected = naive(ready, [short, long])
    mean_gradient(ready, [short, long], micro_batch_size=2)
    assert largest_difference(take(ready), expected) < TOLERANCE


def test_the_base_gets_no_gradient(ready, rows):
    mean_gradient(ready, rows, micro_batch_size=7)
    trained = adapter.parameters(ready.model).values()
    assert all(p.grad is None for p in ready.model.parameters() if not any(p is own for own in trained))
    assert all(bool(p.grad.any()) for p in trained)
