"""What computes in bfloat16 and what stays float32: masters, gradients, the head, rotary positions, what is saved."""

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from gtpo.assembly import refuse_unusable_model
from gtpo.attention import block_causal_attention
from gtpo.batch import pack
from gtpo.config import ModelConfig, config_from_dict
from gtpo.finite import NonFiniteLoss
from gtpo.memory import refuse_unaffordable_cache
from gtpo.models import load_model_and_tokenizer
from gtpo.policy import Policy, load_policy
from gtpo.run_folder import read_rows
from gtpo_kernels import linear_token_logprobs
from tests.trainer.conftest import CORPUS, TINY, tiny_policy
from tests.trainer.test_policy import SEQUENCES, gradients
from tests.trainer.test_trainer import make_trainer

BATCH = pack(SEQUENCES)


def logits(policy: Policy) -> Tensor:
    return policy.project(policy.hidden_states(BATCH).detach())


def tied_policy(**changes: Any) -> Policy:
    config = transformers.Qwen3Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Policy(transformers.Qwen3ForCausalLM(config), None, ModelConfig(device="cpu", **changes))


@pytest.mark.parametrize("make", [tiny_policy, tied_policy])
def test_computing_in_bfloat16_is_the_forward_pass_of_a_bfloat16_model(make: Any) -> None:
    computed, of_dtype = make(compute_dtype="bfloat16"), make(dtype="bfloat16")
    hidden = computed.hidden_states(BATCH)
    assert hidden.dtype == torch.bfloat16 and torch.equal(hidden, of_dtype.hidden_states(BATCH))
    assert torch.equal(logits(computed), logits(of_dtype)) and logits(computed).dtype == torch.float32


@pytest.mark.parametrize("make", [tiny_policy, tied_policy])
@pytest.mark.parametrize("head_dtype", ["auto", "float32"])
def test_gradients_of_bfloat16_passes_reach_float32_weights_of_the_same_names(make: Any, head_dtype: str) -> None:
    wide = make()
    policy = make(compute_dtype="bfloat16", head_dtype=head_dtype)
    assert policy.trainable().keys() == wide.trainable().keys()
    for name, weight in policy.trainable().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, wide.trainable()[name])
    assert policy.num_parameters == wide.num_parameters == sum(w.numel() for w in wide.model.parameters())
    expected = gradients(wide, [BATCH])
    loss_gradients = gradients(policy, [BATCH])
    assert loss_gradients.keys() == expected.keys()
    for name, gradient in loss_gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() < 0.03 * expected[name].norm(), name


def test_gradients_of_micro_batches_are_added_up_in_float32() -> None:
    policy = tiny_policy(compute_dtype="bfloat16")
    parts = [pack([sequence]) for sequence in SEQUENCES]
    apart = [gradients(policy, [part]) for part in parts]
    for name, gradient in gradients(policy, parts).items():
        assert torch.equal(gradient, apart[0][name] + apart[1][name] + apart[2][name]), name
    assert all(weight.grad is None for weight in policy.model.parameters())


def test_a_step_below_bfloat16s_precision_is_kept_and_later_ones_are_computed_with() -> None:
    policy = tiny_policy(compute_dtype="bfloat16")
    before = {name: weight.detach().clone() for name, weight in policy.trainable().items()}
    first = policy.hidden_states(BATCH).detach()
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-6, weight_decay=0.0)
    policy.hidden_states(BATCH).float().square().sum().backward()
    optimizer.step()
    for name, weight in policy.trainable().items():
        assert name == "lm_head.weight" or not torch.equal(weight, before[name]), name
    assert {x.dtype for state in optimizer.state.values() for x in state.values()} == {torch.float32}
    with torch.no_grad():
        for weight in policy.trainable().values():
            weight.mul_(1.5)
    assert not torch.equal(policy.hidden_states(BATCH), first)
    for name, weight in policy.weights().items():
        assert torch.equal(weight, policy.trainable()[name].to(weight.dtype)), name


def test_gradient_checkpointing_changes_no_gradient_of_a_bfloat16_pass() -> None:
    expected = gradients(tiny_policy(compute_dtype="bfloat16"), [BATCH])
    for name, gradient in gradients(
        tiny_policy(compute_dtype="bfloat16", gradient_checkpointing=True), [BATCH]
    ).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"compute_dtype": "bfloat16"}], ids=str)
def test_rotary_frequencies_are_not_rounded(changes: dict[str, Any]) -> None:
    narrow, wide = (dict(p.model.named_buffers()) for p in (tiny_policy(**changes), tiny_policy()))
    assert narrow.keys() == wide.keys() and narrow
    for name, buffer in narrow.items():
        assert torch.equal(buffer, wide[name]), name


PRECISIONS: list[dict[str, Any]] = [
    {"dtype": "bfloat16", "lora_rank": 2},
    {"dtype": "bfloat16", "lora_rank": 2, "head_dtype": "float32"},
    {"compute_dtype": "bfloat16"},
    {"compute_dtype": "bfloat16", "head_dtype": "float32"},
    {"compute_dtype": "bfloat16", "lora_rank": 2},
]


@pytest.mark.parametrize("changes", PRECISIONS, ids=str)
def test_the_sampler_projects_as_the_losses_do(changes: dict[str, Any]) -> None:
    policy = tiny_policy(**changes)
    hidden = policy.hidden_states(BATCH).detach()
    found = torch.log_softmax(policy.project(hidden), dim=-1).gather(1, BATCH.targets[:, None])[:, 0]
    expected = linear_token_logprobs(hidden, policy.head.weight, BATCH.targets, bias=policy.logit_bias).logprobs
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_a_float32_head_keeps_what_bfloat16_would_round(tmp_path: Path) -> None:
    wide = tiny_policy()
    wide.save_model(tmp_path)
    changes = {"source": str(tmp_path), "device": "cpu", "dtype": "bfloat16", "lora_rank": 2, "head_dtype": "float32"}
    policy = load_policy(ModelConfig(**changes))
    assert torch.equal(policy.head.weight, wide.head.weight)
    inner = dict(policy.decoder.named_parameters())
    assert {weight.dtype for name, weight in inner.items() if "lora_" not in name} == {torch.bfloat16}
    tied = tied_policy(dtype="bfloat16", head_dtype="float32")
    assert tied.head.weight is tied.model.get_input_embeddings().weight and tied.head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "most_mean", "most"),
    [({}, 1e-5, 1e-4), *[(changes, 1e-4, 1e-3) for changes in PRECISIONS]],
    ids=str,
)
def test_the_gap_between_sampler_and_trainer_is_logged_and_small(
    tmp_path: Path, changes: dict[str, Any], most_mean: float, most: float
) -> None:
    overrides = [f"--model.{key}={value}" for key, value in changes.items()]
    with make_trainer(tmp_path, "--sft.steps=0", "--train.steps=1", *overrides) as trainer:
        trainer.train()
    (row,) = (row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "train")
    mean, largest = (row[f"sampling/sampling_logp_difference/{name}"] for name in ("mean", "max"))
    assert 0 < mean < most_mean and mean <= largest < most


@pytest.mark.parametrize("make", [tiny_policy, tied_policy])
def test_what_is_saved_are_the_float32_weights(tmp_path: Path, make: Any) -> None:
    policy = make(compute_dtype="bfloat16")
    policy.tokenizer = policy.tokenizer or tiny_policy().tokenizer
    with torch.no_grad():
        for weight in policy.trainable().values():
            weight.add_(1e-5)
    before = logits(policy)
    policy.save_model(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == policy.trainable().keys()
    for name, weight in policy.trainable().items():
        assert torch.equal(saved[name], weight.detach()), name
    assert json_dtype(tmp_path) == "float32"
    again = load_policy(dataclasses.replace(policy.config, source=str(tmp_path)))
    assert torch.equal(logits(again), before) and torch.equal(logits(policy), before)


def json_dtype(folder: Path) -> str:
    return str(transformers.AutoConfig.from_pretrained(folder).dtype).removeprefix("torch.")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
@pytest.mark.parametrize("changes", [{}, *PRECISIONS[:1], *PRECISIONS[-1:]], ids=str)
def test_adapters_are_saved_beside_the_merged_model_as_peft_reads_them(tmp_path: Path, changes: dict[str, Any]) -> None:
    policy = tiny_policy(**({"lora_rank": 2} | changes))
    with torch.no_grad():
        for number, weight in enumerate(policy.trainable().values()):
            weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(number))
    policy.save_model(tmp_path)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    base, _ = load_model_and_tokenizer(TINY, corpus=CORPUS, seed=0, max_tokens=512)
    with torch.no_grad():
        plain = base(BATCH.input_ids[None, :5]).logits[0]
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(BATCH.input_ids[None, :5]).logits[0]
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(BATCH.input_ids[None, :5]).logits[0]
    assert (adapted - plain).abs().max() > 1e-2
    tolerance = 1e-5 if policy.config.dtype == "float32" else 0.1
    torch.testing.assert_close(adapted, merged.float(), atol=tolerance, rtol=0)
    # and they are taken back bit for bit
    again = tiny_policy(**({"lora_rank": 2} | changes))
    again.load_adapters(tmp_path)
    for name, weight in policy.trainable().items():
        assert torch.equal(again.trainable()[name], weight), name
    assert torch.equal(logits(again), logits(policy))


def test_adapters_that_do_not_fit_are_named(tmp_path: Path) -> None:
    policy = tiny_policy(lora_rank=2)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors must hold the adapters of a run, but"):
        policy.load_adapters(tmp_path)
    policy.save_model(tmp_path)
    with pytest.raises(ValueError, match=r"safetensors must hold the weight .*lora_A.* of shape \[3, 32\], got one of"):
        tiny_policy(lora_rank=3).load_adapters(tmp_path)


def test_weights_that_are_not_finite_are_found_before_a_pass_has_copied_them(tmp_path: Path) -> None:
    with make_trainer(tmp_path, "--model.compute_dtype=bfloat16", "--sft.steps=0") as trainer:
        with torch.no_grad():
            trainer.policy.trainable()["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.inf
        with pytest.raises(NonFiniteLoss, match=r"first is model\.layers\.0\.mlp\.up_proj\.weight"):
            trainer.sample_groups(trainer.train_tasks[:1], seed=[0])


def test_flash_attention_is_given_bfloat16_of_a_float32_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, *_: Any, softmax_scale: float, causal: bool) -> Tensor:
        assert {x.dtype for x in (q, k, v)} == {torch.bfloat16} and causal
        rows = (x.transpose(0, 1)[None] for x in (q, k, v))
        return block_causal_attention(*rows, lengths=cu.diff().tolist(), scale=softmax_scale)[0].transpose(0, 1)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=varlen))
    policy = tiny_policy(compute_dtype="bfloat16", attention="flash")
    assert policy.use_flash
    assert torch.equal(policy.hidden_states(BATCH), tiny_policy(compute_dtype="bfloat16").hidden_states(BATCH))


def test_keys_and_values_are_counted_as_they_are_computed(policy: Policy) -> None:
    rollout = {"max_trajectory_tokens": 1_000_000, "group_size": 2, "tasks_per_step": 512, "max_concurrent": 1024}
    config = config_from_dict({"rollout": rollout, "model": {"compute_dtype": "bfloat16"}})
    with pytest.raises(ValueError, match=r"would take at least 131\.1 GB"):
        refuse_unaffordable_cache(config, policy)


def test_float32_passes_over_bfloat16_weights_are_refused() -> None:
    config = config_from_dict({"model": {"dtype": "bfloat16", "compute_dtype": "float32", "lora_rank": 1}})
    with pytest.raises(
        ValueError, match=r'model\.compute_dtype must be "bfloat16" with model\.dtype = "bfloat16", got'
    ):
        refuse_unusable_model(config)


KL = ("--loss.kl=k3", "--loss.kl_coef=0.1", "--model.lora_rank=2")


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_the_reference_of_adapters_is_the_model_without_them(tmp_path: Path, compute_dtype: str) -> None:
    overrides = (*KL, f"--model.compute_dtype={compute_dtype}", "--sft.steps=0", "--train.steps=1")
    with make_trainer(tmp_path, *overrides) as trainer:
        learner, policy = trainer.learner, trainer.policy
        learner.keep_reference()
        assert learner.reference == {}
        expected = learner.with_old_logprobs(BATCH).old_logprobs
        with torch.no_grad():
            for weight in policy.trainable().values():
                weight.add_(0.3)
        moved = learner.with_old_logprobs(BATCH).old_logprobs
        found = learner.with_ref_logprobs(BATCH).ref_logprobs
        assert found is not None and expected is not None and moved is not None
        assert torch.equal(found, expected) and (found - moved).abs().max() > 0.01
        # the adapters are on again, and train
        assert torch.equal(learner.with_old_logprobs(BATCH).old_logprobs, moved)
        assert len(policy.trainable()) == 28
    warmed_up = tmp_path / "warmed_up"
    warmed_up.mkdir()
    with make_trainer(warmed_up, *KL, "--sft.steps=1") as trainer:
        trainer.learner.keep_reference()
        # where a warm-up moved them, training begins with the adapters
        assert trainer.learner.reference.keys() == trainer.policy.trainable().keys()


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_reference_that_waits_on_the_cpu_gives_the_same_log_probs(tmp_path: Path, compute_dtype: str) -> None:
    overrides = ("--loss.kl=k3", "--loss.kl_coef=0.1", "--sft.steps=0", f"--model.compute_dtype={compute_dtype}")
    with make_trainer(tmp_path, *overrides, "--model.reference_device=cpu") as trainer:
        learner, policy = trainer.learner, trainer.policy
        learner.keep_reference()
        expected = learner.with_old_logprobs(BATCH).old_logprobs
        with torch.no_grad():
            for weight in policy.trainable().values():
                weight.mul_(1.5)
        # within the very first pass after the weights moved
        found = learner.with_ref_logprobs(BATCH).ref_logprobs
        again = learner.with_ref_logprobs(BATCH).ref_logprobs
        moved = learner.with_old_logprobs(BATCH).old_logprobs
        assert found is not None and expected is not None and moved is not None and again is not None
        assert torch.equal(found, expected) and torch.equal(again, expected)
        assert (found - moved).abs().max() > 0.01
        policy.reference_device = torch.device("meta")
        assert {weight.device.type for weight in policy.reference_weights().values()} == {"meta"}
