"""The policy on packed batches, its trainable parts, and what it writes."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import Tensor

from gtpo.batch import Batch, pack
from gtpo.config import ModelConfig
from gtpo.policy import Policy, load_policy
from gtpo_kernels import linear_token_logprobs
from tests.trainer.conftest import CORPUS, make_sequence, tiny_policy

SEQUENCES = [make_sequence([5, 80, 7, 120, 9, 33]), make_sequence([44, 45]), make_sequence([90, 12, 12, 200, 61])]


def loss_of(policy: Policy, batch: Batch) -> Tensor:
    hidden = policy.hidden_states(batch)
    logprobs = linear_token_logprobs(hidden, policy.head.weight, batch.targets).logprobs
    return (logprobs * torch.linspace(1, 2, len(logprobs))[0] * (1 + batch.targets % 3)).sum()


def gradients(policy: Policy, batches: list[Batch]) -> dict[str, Tensor]:
    for weight in policy.trainable().values():
        weight.grad = None
    for batch in batches:
        loss_of(policy, batch).backward()
    found = {name: weight.grad for name, weight in policy.trainable().items() if weight.grad is not None}
    for weight in policy.trainable().values():
        weight.grad = None
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_packed_equals_one_by_one(dtype: torch.dtype, tolerance: float) -> None:
    policy = tiny_policy()
    policy.model.to(dtype)
    together, apart = pack(SEQUENCES), [pack([sequence]) for sequence in SEQUENCES]
    expected = torch.cat([policy.hidden_states(batch) for batch in apart])
    torch.testing.assert_close(policy.hidden_states(together), expected, atol=tolerance, rtol=tolerance)
    packed, single = gradients(policy, [together]), gradients(policy, apart)
    assert packed.keys() == single.keys() == policy.trainable().keys()
    for name, gradient in packed.items():
        scale = float(single[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(gradient, single[name], atol=tolerance * (1 + scale), rtol=tolerance, msg=name)


def test_packed_equals_plain_transformers_attention(policy: Policy, tmp_path: Path) -> None:
    policy.save_model(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    hidden = policy.hidden_states(pack(SEQUENCES)).detach()
    rows = (hidden @ policy.head.weight.T).split([len(sequence.token_ids) - 1 for sequence in SEQUENCES])
    for sequence, logits in zip(SEQUENCES, rows, strict=True):
        expected = plain(torch.tensor([sequence.token_ids[:-1]])).logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    # padded on the left and on the right, as batches of other trainers are
    ids = sequence.token_ids[:-1]
    for pads in ((2, 0), (0, 2)):
        padded = torch.tensor([[0] * pads[0] + ids + [0] * pads[1]])
        mask = torch.tensor([[0] * pads[0] + [1] * len(ids) + [0] * pads[1]])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = plain(padded, attention_mask=mask, position_ids=positions).logits[0, pads[0] : pads[0] + len(ids)]
        torch.testing.assert_close(logits, out, atol=1e-5, rtol=1e-5)
    reloaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.chat_template == policy.tokenizer.chat_template
    assert reloaded("print(12)")["input_ids"] == policy.tokenizer("print(12)")["input_ids"]


def test_no_attention_crosses_sequences_or_looks_ahead(policy: Policy) -> None:
    batch = pack(SEQUENCES)
    inputs: list[Tensor] = []
    handle = policy.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: inputs.append(output.detach().requires_grad_()) or inputs[0]
    )
    hidden = policy.hidden_states(batch)
    handle.remove()
    (gradient,) = torch.autograd.grad(hidden[8].square().sum(), inputs[0])
    seen = gradient[0].norm(dim=1) > 0
    # row 8 is the third of the last sequence, which starts at row 6
    assert seen.tolist() == [False] * 6 + [True] * 3 + [False]


def test_gradient_checkpointing_changes_no_gradient(policy: Policy) -> None:
    batch = [pack(SEQUENCES)]
    expected = gradients(policy, batch)
    for name, gradient in gradients(tiny_policy(gradient_checkpointing=True), batch).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_lora_trains_adapters_only_and_saves_a_plain_model(tmp_path: Path) -> None:
    policy = tiny_policy(lora_rank=4)
    assert all("lora_" in name for name in policy.trainable()) and len(policy.trainable()) == 2 * 7 * 2
    adapters = sum(weight.numel() for weight in policy.trainable().values())
    assert policy.num_parameters == tiny_policy().num_parameters + adapters
    batch = pack(SEQUENCES)
    before = (policy.hidden_states(batch) @ policy.head.weight.T).detach()
    assert gradients(policy, [batch]).keys() == policy.trainable().keys()
    with torch.no_grad():
        for number, parameter in enumerate(policy.trainable().values()):
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(number))
    adapted = (policy.hidden_states(batch) @ policy.head.weight.T).detach()
    assert (adapted - before).abs().max() > 1e-2
    policy.save_model(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    first = plain(batch.input_ids[None, :5]).logits[0]
    torch.testing.assert_close(first, adapted[:5], atol=1e-5, rtol=1e-4)
    # saving leaves the policy as it was, its adapters apart
    torch.testing.assert_close(policy.hidden_states(batch) @ policy.head.weight.T, adapted, atol=0, rtol=0)
    again = load_policy(ModelConfig(source=str(tmp_path), device="cpu"))
    torch.testing.assert_close(again.hidden_states(batch) @ again.head.weight.T, adapted, atol=1e-5, rtol=1e-4)


def test_lora_with_gradient_checkpointing_has_the_same_gradients() -> None:
    batch = [pack(SEQUENCES)]
    torch.manual_seed(0)
    plain = tiny_policy(lora_rank=4)
    torch.manual_seed(0)
    checkpointed = tiny_policy(lora_rank=4, gradient_checkpointing=True)
    expected = gradients(plain, batch)
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in gradients(checkpointed, batch).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_a_frozen_head_gets_no_gradient() -> None:
    policy = tiny_policy(freeze_head=True)
    gradients(policy, [pack(SEQUENCES)])
    assert "lm_head.weight" not in policy.trainable() and len(policy.trainable()) > 10
    loss_of(policy, pack(SEQUENCES)).backward()
    assert policy.head.weight.grad is None
    assert policy.model.get_input_embeddings().weight.grad.abs().max() > 0


def test_a_tied_head_cannot_be_frozen() -> None:
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
    )
    with pytest.raises(ValueError, match="freeze_head needs a head of its own"):
        Policy(transformers.Qwen3ForCausalLM(config), None, ModelConfig(device="cpu", freeze_head=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer types .*sliding_attention"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ],
)
def test_models_that_packing_would_compute_wrongly_are_refused(changes: dict[str, object], message: str) -> None:
    policy = tiny_policy()
    for key, value in changes.items():
        setattr(policy.model.config, key, value)
    with pytest.raises(ValueError, match=message):
        Policy(policy.model, policy.tokenizer, policy.config)


def test_attention_that_packing_does_not_compute_is_refused() -> None:
    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"],
        pad_token_id=0,
    )
    with pytest.raises(ValueError, match=r"'gpt_oss' .* GptOssAttention needs attention that is not supported: s_aux"):
        Policy(transformers.GptOssForCausalLM(config), None, ModelConfig(device="cpu"))


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.RwkvConfig(**SMALL, attention_hidden_size=32), "'rwkv' .* logits in packed training are not"),
        (transformers.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32), "'opt' .* a trial run raised Attribute"),
        (transformers.FalconConfig(**SMALL), "'falcon' .* a trial run raised AttributeError"),
        (
            transformers.StableLmConfig(**SMALL, num_key_value_heads=1, intermediate_size=48),
            "'stablelm' .* a trial run raised ValueError: the policy's attention needs packed_lengths",
        ),
        (
            transformers.Gemma3Config(
                text_config={**SMALL, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48},
                vision_config=dict.fromkeys(("hidden_size", "intermediate_size", "image_size", "patch_size"), 32)
                | {"num_hidden_layers": 1, "num_attention_heads": 2},
            ),
            "every layer must have full causal attention, got layer types .*sliding_attention",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_models_that_do_not_fit_are_refused_as_they_are_loaded(config: Any, message: str) -> None:
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    with pytest.raises(ValueError, match=message):
        Policy(transformers.AutoModelForCausalLM.from_config(config), None, ModelConfig(device="cpu"))


def test_dropout_modules_of_any_name_are_turned_off() -> None:
    config = transformers.PersimmonConfig(**SMALL, intermediate_size=48, attention_dropout=0.5, hidden_dropout=0.5)
    policy = Policy(transformers.PersimmonForCausalLM(config), None, ModelConfig(device="cpu"))
    policy.model.train()
    found = [module.p for module in policy.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert found and not any(found)


class DoubledLogits(transformers.Qwen3ForCausalLM):
    """A model whose logits are not its head's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_that_are_not_those_of_the_model_itself_are_refused(
    dtype: Literal["float32", "bfloat16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy(dtype=dtype)
    with pytest.raises(ValueError, match="'qwen3' are not supported: logits in packed training are not those"):
        Policy(DoubledLogits(policy.model.config), policy.tokenizer, policy.config)
    extend = Policy.extend
    monkeypatch.setattr(Policy, "extend", lambda self, ids, cache: extend(self, ids, cache).roll(1, dims=1))
    with pytest.raises(ValueError, match="'qwen3' are not supported: logits in sampling are not those"):
        tiny_policy(dtype=dtype)


def test_the_seed_decides_the_weights_and_leaves_the_global_generator() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, two = tiny_policy(gradient_checkpointing=True), load_policy(tiny_policy().config, corpus=CORPUS, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.head.weight, tiny_policy().head.weight)
    assert not torch.equal(one.head.weight, two.head.weight)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(source="no/such/folder"), 'must be "tiny", "package:NAME", a folder or a hub id'),
        (ModelConfig(source="package:no_such_package"), "'no_such_package', which is not installed"),
        (ModelConfig(source="package:json"), r"must hold one \.gguf file"),
        (ModelConfig(vocab_size=100), "vocab_size must be at least 259"),
    ],
)
def test_a_model_that_is_not_there_is_named(config: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_policy(config)


def test_a_call_around_the_policy_is_refused(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"call Policy\.hidden_states"):
        policy.model(torch.tensor([[1, 2]]))
