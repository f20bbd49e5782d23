"""What is refused, or warned of, as a model is loaded for sequences of a given length; and ids that have no token."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gtpo import trial
from gtpo.batch import pack
from gtpo.config import Config, ModelConfig, RolloutConfig, config_from_dict
from gtpo.learner import Learner
from gtpo.policy import Policy, load_policy
from gtpo.sampler import SampledSequence
from gtpo.sft import accumulate_sft_gradient
from gtpo.trainer import Trainer
from tests.trainer.conftest import make_sampler, make_sequence, tiny_policy

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ROPE = {"rope_theta": 100.0, "factor": 4.0}
DYNAMIC = transformers.LlamaConfig(
    **SMALL, max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", **ROPE}
)
LONGROPE = transformers.Phi3Config(
    **SMALL,
    max_position_embeddings=512,
    original_max_position_embeddings=128,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 128,
    },
)
DOGE = transformers.DogeConfig(**SMALL, keep_window_size=16)
YARN = transformers.LlamaConfig(
    **SMALL,
    max_position_embeddings=512,
    rope_parameters={"rope_type": "yarn", "original_max_position_embeddings": 64, **ROPE},
)
GPT2 = transformers.GPT2Config(
    vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0
)


def load(config: Any, *, max_tokens: int, tokenizer: Any = None) -> Policy:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return Policy(model, tokenizer, ModelConfig(device="cpu"), max_tokens=max_tokens)


def largest_gap(policy: Policy, prompts: list[list[int]], *, num_tokens: int, temperature: float = 1.0) -> float:
    """Of the log-probs that the sampler reports, from those of all sequences packed together."""
    max_tokens = max(map(len, prompts)) + num_tokens
    sampler = make_sampler(policy, num_slots=len(prompts), max_tokens=max_tokens)

    async def start(sequence: SampledSequence) -> tuple[list[int], list[float]]:
        prompt = prompts[sequence.number]
        completion = await sequence.sample(prompt, max_new_tokens=num_tokens)
        return [*prompt, *completion.token_ids], completion.logprobs

    played = asyncio.run(sampler.run(start, seeds=[[i] for i in range(len(prompts))], temperature=temperature))
    batch = pack([make_sequence(ids) for ids, _ in played])
    rows = Learner(policy, Config(rollout=RolloutConfig(temperature=temperature)))._logprobs(
        policy.hidden_states(batch).detach(), batch.targets
    )
    gaps = [
        (part[len(ids) - num_tokens - 1 :] - torch.tensor(logprobs)).abs().max()
        for (ids, logprobs), part in zip(played, rows.split(batch.lengths), strict=True)
    ]
    return float(max(gaps))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DYNAMIC, r"rope_type 'dynamic' change beyond 64 tokens .* must be at most 64, got 201"),
        (LONGROPE, r"rope_type 'longrope' change beyond 128 tokens .* must be at most 128, got 201"),
        (DOGE, r"'doge' are not supported: .* DogeAttention masks or biases its attention"),
        (GPT2, r"table of positions has 128 rows: rollout.max_trajectory_tokens must be at most 129, got 201"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_models_that_are_others_from_some_length_on_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        load(config, max_tokens=201)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("config", "max_tokens"), [(DYNAMIC, 64), (LONGROPE, 128), (GPT2, 129), (YARN, 300)])
def test_up_to_that_length_sampler_and_trainer_agree(config: Any, max_tokens: int) -> None:
    policy = load(config, max_tokens=max_tokens)
    prompts = [[5, 9, 7], list(range(1, 11))]
    assert largest_gap(policy, prompts, num_tokens=max_tokens - 10) < 1e-4
    with pytest.raises(ValueError, match=f"at most the policy's {max_tokens} tokens, got {max_tokens + 1}"):
        policy.hidden_states(pack([make_sequence([1] * (max_tokens + 1))]))
    with pytest.raises(ValueError, match=f"at most the policy's {max_tokens}, got {max_tokens + 1}"):
        largest_gap(policy, prompts, num_tokens=max_tokens - 9)


class LatePositions(transformers.Qwen3ForCausalLM):
    """Positions that turn faster as soon as a batch has one beyond 100; nothing in the configuration says so."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.rotary_emb.register_forward_pre_hook(self._stretch, with_kwargs=True)

    @staticmethod
    def _stretch(module: Any, args: Any, kwargs: Any) -> Any:
        *others, positions = (*args, *kwargs.values())
        return (*others, positions * 2 if int(positions.max()) > 100 else positions), {}


@pytest.mark.parametrize("config", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_the_trial_alone_finds_positions_that_change(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_CHANGING_ROPES", ())
    with pytest.raises(ValueError, match="logits in packed training are not those of the model itself at 200 tokens"):
        load(config, max_tokens=201)


def test_the_trial_is_long_where_that_is_cheap_or_a_length_is_in_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def late(**keys: int) -> Policy:
        config = transformers.Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=False, **keys)
        return Policy(LatePositions(config), None, ModelConfig(device="cpu"), max_tokens=201)

    refused = pytest.raises(ValueError, match="are not those of the model itself at 200 tokens, though they are at 7")
    with refused:
        late()
    # as for a model for which 200 tokens are much
    monkeypatch.setattr(trial, "_CHEAP", 0.0)
    late()
    with refused:
        late(stretch_from=100)


@pytest.mark.parametrize(
    "config",
    [
        transformers.Qwen3Config(),
        transformers.Qwen2Config(),
        transformers.LlamaConfig(),
        transformers.OlmoConfig(),
        transformers.Qwen3MoeConfig(),
        transformers.SmolLM3Config(),
    ],
    ids=lambda config: config.model_type,
)
def test_a_usual_configuration_holds_no_such_length(config: Any) -> None:
    """So that large models of these families start after a trial of seven tokens."""
    assert [length for length in trial._possible_lengths(config.to_dict()) if length < 2000] == []


def test_more_tokens_than_the_model_was_made_for_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.LlamaConfig(**SMALL, max_position_embeddings=64)
    for max_tokens, lines in ((64, 0), (65, 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load(config, max_tokens=max_tokens)
        assert len(caplog.records) == lines
    assert caplog.messages == [
        "the model was made for 64 tokens (max_position_embeddings), rollout.max_trajectory_tokens is 65"
    ]


# ids without a token


def padded(policy: Policy, num_rows: int, *, bias: bool = False) -> Policy:
    """The same model with a head and an embedding of `num_rows`, whose further rows are the likeliest of all."""
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(policy.model.config.__class__(**policy.model.config.to_dict()))
    model.resize_token_embeddings(num_rows)
    if bias:
        model.lm_head = torch.nn.Linear(model.config.hidden_size, num_rows)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.5)
    return Policy(model, policy.tokenizer, policy.config)


@pytest.mark.parametrize("bias", [False, True])
def test_ids_without_a_token_are_neither_sampled_nor_trained(policy: Policy, bias: bool) -> None:
    num_tokens = len(policy.tokenizer)
    wide = padded(policy, 512, bias=bias)
    assert wide.head.weight.shape[0] == 512 and num_tokens == 300
    sampler = make_sampler(wide, num_slots=8)

    async def start(sequence: SampledSequence) -> list[int]:
        return (await sequence.sample([5, 6, 7], max_new_tokens=50)).token_ids

    played = asyncio.run(sampler.run(start, seeds=[[i] for i in range(8)], temperature=1.5))
    sampled = [token for ids in played for token in ids]
    assert len(set(sampled)) > 100 and max(sampled) < num_tokens
    assert largest_gap(wide, [[5, 6, 7], [8, 9]], num_tokens=40, temperature=1.5) < 1e-4
    sequence = make_sequence([5, 6, 7, *sampled[:20]])
    hidden, targets = wide.hidden_states(pack([sequence])), pack([sequence]).targets
    logits = torch.nn.functional.linear(hidden, wide.head.weight, wide.head.bias)[:, :num_tokens]
    expected = torch.nn.functional.cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(expected, wide.head.weight)
    loss = accumulate_sft_gradient(wide, [sequence], micro_batch_tokens=1000)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert isinstance(wide.head.weight.grad, Tensor)
    torch.testing.assert_close(wide.head.weight.grad, gradient, atol=1e-6, rtol=1e-4)
    assert not wide.head.weight.grad[num_tokens:].any()


def test_holes_among_the_tokens_are_masked_and_whole_heads_are_not(policy: Policy) -> None:
    assert policy.logit_bias is None
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=policy.tokenizer.backend_tokenizer, eos_token="<|im_end|>"
    )
    holed = {token: number for token, number in tokenizer.get_vocab().items() if number not in (100, 200)}
    tokenizer.get_vocab = lambda: holed  # type: ignore[method-assign]
    bias = Policy(policy.model, tokenizer, policy.config).logit_bias
    assert bias is not None and bias.isneginf().nonzero().flatten().tolist() == [100, 200]


def saved(folder: Path, *, num_more: int) -> str:
    policy = tiny_policy()
    policy.tokenizer.add_tokens([f"<more{number}>" for number in range(num_more)])
    policy.save_model(folder)
    return str(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the token '<more1>' has the id 301, the embedding has 300 rows and the head"
    ):
        load_policy(ModelConfig(source=saved(tmp_path / "model", num_more=2), device="cpu"))


def test_a_model_is_refused_before_the_folder_is_touched(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = {
        "output_dir": str(run),
        "model": {"source": saved(tmp_path / "model", num_more=1), "device": "cpu"},
        "environments": [{"name": "retry", "options": {"num_items": 1, "num_getters": 2}}],
        "tasks": {"num_train": 2, "num_eval": 2},
    }
    run.mkdir()
    (run / "gtpo_run").touch()
    (run / "metrics.jsonl").write_text("kept\n")
    with pytest.raises(ValueError, match="the token '<more0>' has the id 300"):
        Trainer(config_from_dict(config), overwrite=True).__enter__()
    long = config | {"model": {"source": "tiny", "device": "cpu"}, "rollout": {"max_trajectory_tokens": 700}}
    trainer = Trainer(config_from_dict(long), overwrite=True)
    assert trainer.policy.max_tokens == 700
    trainer.tools.stop()
    trainer.run.close()
    assert (run / "metrics.jsonl").read_text() == "kept\n"
