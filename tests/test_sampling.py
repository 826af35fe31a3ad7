"""Sampling: every step equals transformers' own processor, and small cases are worked by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from cvlib import sampling
from cvlib.recipes import Decoding
from cvlib.sampling import probabilities

LOGITS = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)) * 4
SAID = [[3, 3, 77], [5, 6, 7], [199, 0, 1]]
PLAIN = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}


def rows(tokens):
    return torch.tensor(tokens)


# one step at a time


@pytest.mark.parametrize("penalty", [1.0, 1.1, 3.0])
def test_the_penalty_equals_theirs(penalty):
    wanted = theirs.RepetitionPenaltyLogitsProcessor(penalty)(rows(SAID), LOGITS.clone())
    assert torch.equal(sampling.penalised(LOGITS, SAID, penalty), wanted)


@pytest.mark.parametrize("k", [1, 2, 50, 200, 10_000])
def test_top_k_equals_theirs(k):
    assert torch.equal(sampling.top_k(LOGITS, k), theirs.TopKLogitsWarper(k)(None, LOGITS))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_equals_theirs(p):
    assert torch.equal(sampling.top_p(LOGITS, p), theirs.TopPLogitsWarper(p)(None, LOGITS))


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.99])
def test_min_p_equals_theirs(share):
    assert torch.equal(sampling.min_p(LOGITS, share), theirs.MinPLogitsWarper(share)(None, LOGITS))


# all of them, in order


@pytest.mark.parametrize("temperature", [0.2, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 10_000])
@pytest.mark.parametrize("top_p", [0.05, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.1])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_sampling_equals_transformers_processors(temperature, top_k, top_p, min_p, penalty):
    scores = theirs.RepetitionPenaltyLogitsProcessor(penalty)(rows(SAID), LOGITS.clone())
    scores = theirs.TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = theirs.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = theirs.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = theirs.MinPLogitsWarper(min_p)(None, scores)
    mine = probabilities(LOGITS, SAID, Decoding(temperature, top_k, top_p, min_p, penalty))
    torch.testing.assert_close(mine, scores.softmax(-1), atol=1e-6, rtol=1e-5)
    assert torch.equal(mine > 0, scores.softmax(-1) > 0)


def test_the_order_is_that_of_generate(tiny):
    """`generate` builds this very list from the same settings."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.logits_process import LogitsProcessorList

    model = AutoModelForCausalLM.from_pretrained(tiny)

    settings = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3}
    config = GenerationConfig(do_sample=True, **settings)
    built = model._get_logits_processor(config, input_ids_seq_length=3, logits_processor=LogitsProcessorList())
    scores = LOGITS.clone()
    for step in built:
        scores = step(rows(SAID), scores)
    torch.testing.assert_close(probabilities(LOGITS, SAID, Decoding(**settings)), scores.softmax(-1))
    names = [type(step).__name__.replace("Logits", " ").split()[0] for step in built]
    assert names == ["RepetitionPenalty", "Temperature", "TopK", "TopP", "MinP"]


def test_probabilities_by_hand():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).log()  # chances 0.4, 0.3, 0.2, 0.1

    def found(**changes):
        return [round(p, 4) for p in probabilities(logits, [[]], Decoding(**PLAIN | changes))[0].tolist()]

    assert found() == [0.4, 0.3, 0.2, 0.1]
    assert found(top_k=2) == [0.5714, 0.4286, 0, 0]
    assert found(top_p=0.69) == [0.5714, 0.4286, 0, 0]
    assert found(top_p=0.71) == [0.4444, 0.3333, 0.2222, 0]
    assert found(min_p=0.6) == [0.5714, 0.4286, 0, 0]
    assert found(min_p=0.3) == [0.4444, 0.3333, 0.2222, 0]
    assert found(temperature=0.5) == [0.5333, 0.3, 0.1333, 0.0333]
    assert found(temperature=0) == [1, 0, 0, 0]


def test_the_penalty_divides_what_is_positive_and_multiplies_what_is_not():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    before = logits.clone()
    mine = probabilities(logits, [[0, 1, 1, 1]], Decoding(**PLAIN | {"repetition_penalty": 2}))
    torch.testing.assert_close(mine, torch.tensor([[1.0, -4.0, 2.0, -2.0]]).softmax(-1))
    assert torch.equal(logits, before)  # the caller's logits are not touched


@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=12),
    st.floats(0, 3),
    st.integers(0, 15),
    st.floats(0.01, 1),
    st.floats(0, 0.99),
)
@settings(deadline=None, max_examples=200)
def test_something_always_remains(logits, temperature, top_k, top_p, min_p):
    chances = probabilities(torch.tensor([logits]), [[0]], Decoding(temperature, top_k, top_p, min_p, 1.2))
    assert chances.sum().item() == pytest.approx(1, abs=1e-5)
