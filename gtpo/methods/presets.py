"""The published methods: the settings of each, its source, and an example worked by hand, which is run as a doctest."""

import textwrap
from dataclasses import dataclass
from typing import Any

from gtpo.methods.records import CreditSum, Method, PolicyLoss, RewardRule, Term


@dataclass(frozen=True)
class Preset:
    """A method under its published name. source: where its formula is from. notes: what is ours, and the example."""

    method: Method
    source: str
    notes: str


# One terminal reward, that of the outcome: what GRPO and its kin compare.
_OUTCOME = RewardRule(format_penalty=0.0, outcome_needs_format=True, similarity_alpha=0.0)
# Rewards of single turns: the outcome, format, and execution, without GTPO's similarity credit.
_TURNS = RewardRule(similarity_alpha=0.0, execution_bonus=0.05, execution_penalty=0.05)
_DENSE = RewardRule(execution_bonus=0.05, execution_penalty=0.05)

_TRAJECTORY: dict[str, Any] = {"quantity": "trajectory_return", "gamma": 1.0, "population": "trajectories"}
# One value a trajectory, normalised in its group, or less the group's mean.
_GRPO = CreditSum((Term(**_TRAJECTORY),))
_CENTRED = CreditSum((Term(**_TRAJECTORY, scale="none"),))

# Loss of the methods that state no other than PPO's: the symmetric clip of the paper.
_CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2}
# What trainers made from verl add to it where they do not say otherwise.
_VERL: dict[str, Any] = {**_CLIP, "dual_clip": 3.0, "kl": "k3", "kl_coef": 0.001, "entropy_coef": 0.001}

PRESETS: dict[str, Preset] = {
    "gtpo": Preset(
        Method(),
        "Group Turn Policy Optimization, arXiv 2511.14846",
        """
        Returns of all turns of the group share a mean and a deviation. By hand, gamma 0.9: returns 0.9, 1 and 0; mean
        19/30, deviation 0.5508.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0]])
        [[0.4842, 0.6657], [-1.1499]]
        """,
    ),
    "gtpo_dense": Preset(
        Method(_DENSE),
        "GTPO, arXiv 2511.14846, with execution feedback: ours",
        """
        The credit of gtpo. Turns earn or lose 0.05 by what their code did: by hand, a turn of 0.05 before a right
        answer, another of -0.05 before a wrong one: returns 0.95, 1, -0.05, 0; mean 0.475, deviation 0.5781.

        >>> group_advantages(credit, [[0.05, 1.0], [-0.05, 0.0]])
        [[0.8217, 0.9082], [-0.9082, -0.8217]]
        """,
    ),
    "grpo": Preset(
        Method(_OUTCOME, _GRPO),
        "the GRPO baseline of arXiv 2511.14846; credit of arXiv 2402.03300",
        """
        One number a trajectory, that of its outcome. By hand: outcomes 1, 0, 0; mean 1/3, deviation 0.5774. The loss is
        GTPO's (clip 0.2 / 0.28, token-mean, no KL), so that the two differ in their credit alone; with the loss of the
        paper that named GRPO it is deepseek_grpo.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0], [0.0, 0.0, 0.0]])
        [[1.1547, 1.1547], [-0.5773], [-0.5773, -0.5773, -0.5773]]
        """,
    ),
    "deepseek_grpo": Preset(
        Method(_OUTCOME, _GRPO, PolicyLoss(**_CLIP, aggregation="seq-mean-token-mean", kl="k3", kl_coef=0.04)),
        "Group Relative Policy Optimization, arXiv 2402.03300 (outcome supervision)",
        """
        KL 0.04 is the paper's; it gives no number for its clip: 0.2 is PPO's. By hand: outcomes 1 and 0; mean 1/2,
        deviation 0.7071.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0]])
        [[0.7071, 0.7071], [-0.7071]]
        """,
    ),
    "dr_grpo": Preset(
        Method(_OUTCOME, _CENTRED, PolicyLoss(**_CLIP, aggregation="constant")),
        "Dr. GRPO, arXiv 2503.20783",
        """
        No deviation, no length: outcome minus the group's mean; clip 0.2 is PPO's. By hand: 1 - 1/4 and 0 - 1/4.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0], [0.0], [0.0]])
        [[0.75, 0.75], [-0.25], [-0.25], [-0.25]]
        """,
    ),
    "dapo": Preset(
        Method(_OUTCOME, _GRPO, PolicyLoss(mask_truncated=True)),
        "DAPO, arXiv 2503.14476",
        """
        GRPO's credit, clip 0.2 / 0.28, token-mean, no KL, truncated trajectories out of the loss. Its dynamic sampling
        and its soft length penalty are no part of credit or loss, and not here. By hand: outcomes 1, 1, 0; mean 2/3,
        deviation 0.5774.

        >>> group_advantages(credit, [[1.0], [0.0, 1.0], [0.0]])
        [[0.5773], [0.5773, 0.5773], [-1.1547]]
        """,
    ),
    "rloo": Preset(
        Method(
            _OUTCOME,
            CreditSum((Term(**_TRAJECTORY, centre="leave_one_out", scale="none"),)),
            PolicyLoss(surrogate="reinforce", aggregation="seq-mean-token-sum"),
        ),
        "REINFORCE leave-one-out, arXiv 2402.14740",
        """
        Outcome minus the mean of the others. By hand: 1 - 0, and 0 - 1/2 twice. The paper's KL penalty is part of its
        reward, and not here.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0], [0.0]])
        [[1.0, 1.0], [-0.5], [-0.5]]
        """,
    ),
    "turn_rloo": Preset(
        Method(
            RewardRule(),
            CreditSum((Term(gamma=1.0, scope="group_turn", centre="leave_one_out", scale="none", singleton="keep"),)),
            PolicyLoss(aggregation="constant"),
        ),
        "ours: leave-one-out for turns, unbiased on all processes of docs/credit.md",
        """
        The sum of rewards from this turn on, minus the mean of the other trajectories' at the same turn; all of it
        where no other got that far. Rewards and clips of gtpo; the mean over tokens is dr_grpo's,
        which no length enters. By hand: first turns 1 - 1/4, 1/2 - 1/2 and 0 - 3/4; the
        second turn is alone.

        >>> group_advantages(credit, [[0.0, 1.0], [0.5], [0.0]])
        [[0.75, 1.0], [0.0], [-0.75]]
        """,
    ),
    "reinforce_pp": Preset(
        Method(
            _OUTCOME,
            CreditSum(_CENTRED.terms, whiten=True),
            PolicyLoss(**_CLIP, kl="k2", kl_coef=0.001),
        ),
        "REINFORCE++, its baseline form, arXiv 2501.03262",
        """
        Outcome minus the group's mean, then whitened over all tokens of the batch. By hand: 1/2 on two turns of a token
        each, -1/2 on one; mean 1/6, deviation 0.5774. The KL loss is that of the script of its authors' OpenRLHF,
        train_reinforce_baseline_llama_ray_agent_async.sh (k2, 0.001); other trainers (ms-swift, NeMo-RL) put the KL
        into the reward.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0]])
        [[0.5774, 0.5774], [-1.1547]]
        """,
    ),
    "gspo": Preset(
        Method(
            _OUTCOME,
            _GRPO,
            PolicyLoss(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4, aggregation="seq-mean-token-mean"),
        ),
        "Group Sequence Policy Optimization, arXiv 2507.18071",
        """
        GRPO's credit; the ratio is the geometric mean over the sequence, clips of the paper's section 5.1. Where
        advantages differ within a sequence each token keeps its own (GSPO-token). By hand: as for deepseek_grpo.

        >>> group_advantages(credit, [[0.0], [0.0, 1.0]])
        [[-0.7071], [0.7071, 0.7071]]
        """,
    ),
    "cispo": Preset(
        # the paper sets no lower bound: a ratio of 0 is the least there is
        Method(_OUTCOME, _GRPO, PolicyLoss(surrogate="cispo", clip_low=1.0, clip_high=4.0)),
        "CISPO of MiniMax-M1, arXiv 2506.13585",
        """
        GRPO's credit; the clipped ratio weights the log-prob, so that no token is left out. The paper gives no number
        for its upper bound: 1 + 4.0 is ours. By hand: outcomes 1, 1, 0, 0; mean 1/2, deviation 0.5774.

        >>> group_advantages(credit, [[1.0], [0.0, 1.0], [0.0], [0.0]])
        [[0.866], [0.866, 0.866], [-0.866], [-0.866]]
        """,
    ),
    "mt_grpo": Preset(
        Method(
            _TURNS,
            CreditSum(
                (
                    Term(quantity="outcome", population="trajectories", eps=1e-4),
                    Term(turns="with_calls", others="zero", quantity="turn_reward", scope="group_turn", eps=1e-4),
                )
            ),
            PolicyLoss(**_CLIP),
        ),
        "MT-GRPO, arXiv 2505.11821",
        """
        All turns get the normalised outcome; those that call a tool also their reward, normalised among all at the
        same turn, of which those without a call count 0. The paper has two turns, a call and an answer. Its turn
        rewards are of search results, ours of format and execution. Credit, loss and eps are of the authors'
        mt_grpo_env_trainer.py and run_mt_grpo.sh (github.com/SiliangZeng/Multi-Turn-RL-Agent): token-mean, TRL's clip
        0.2, beta 0; their example has KL 0.01 by default. There a rollout without a call gets its normalised sum of
        both rewards; here it gets its outcome. By hand: outcomes 1, 0 give 0.7070 and -0.7070 (eps 1e-4), first turns
        of 0.2 and 0 another 0.7066 and -0.7066; and 1, 1, 0 give 0.5773 and -1.1545, calls of 1, 0 beside an answer
        (0) mean 1/3, deviation 0.5774: 1.1545 and -0.5773.

        >>> group_advantages(credit, [[0.2, 1.0], [0.0, 0.0]], outcomes=[1.0, 0.0], calls=[[True, False]] * 2)
        [[1.4136, 0.707], [-1.4136, -0.707]]
        >>> rewards, calls = [[1.0, 0.0], [0.0, 0.0], [0.5]], [[True, False], [True, False], [False]]
        >>> group_advantages(credit, rewards, outcomes=[1.0, 1.0, 0.0], calls=calls)
        [[1.7318, 0.5773], [0.0, 0.5773], [-1.1545]]
        """,
    ),
    "matchtir": Preset(
        Method(
            _TURNS,
            CreditSum((Term(**_TRAJECTORY, weight=0.5), Term(weight=0.5, gamma=0.9, scope="group_turn"))),
            PolicyLoss(**_VERL, aggregation="seq-mean-token-mean"),
        ),
        "MatchTIR, arXiv 2601.10712",
        """
        Half the normalised sum of rewards, half the discounted returns normalised at the same turn. Its rewards match
        calls with those of a known solution; ours are of format and execution. Halves, discount and loss are those of
        the authors' core_algos.py and run.sh (github.com/CyberSculptor96/MatchTIR); there what is alone at its turn
        keeps its return, as with singleton "keep". By hand: sums 1, 0 give 0.7071, -0.7071; first turns 0.9, 0 the
        same, and so do the second.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0, 0.0]])
        [[0.7071, 0.7071], [-0.7071, -0.7071]]
        >>> group_advantages(credit, [[0.0, 1.0], [0.0]])  # nothing to compare the second turn with
        [[0.7071, 0.3536], [-0.7071]]
        """,
    ),
    "gigpo": Preset(
        Method(
            _TURNS,
            CreditSum((Term(**_TRAJECTORY), Term(gamma=0.95, scope="group_anchor"))),
            PolicyLoss(**_VERL | {"kl_coef": 0.01}),
        ),
        "Group-in-Group Policy Optimization, arXiv 2505.10978",
        """
        The normalised sum of rewards, and the discounted returns normalised among turns taken in the same state. The
        trainer takes what the tools last said for the state. Credit and loss are of the authors' run_alfworld.sh and
        ppo_trainer.yaml (github.com/langfengQ/DrMAS): mean_std_norm, discount 0.95, KL 0.01, token-mean. Their WebShop
        has no deviation and discount 0.985; they take 0.1 off an invalid action in the reward, and train on each turn
        as a sample of its own. By hand: sums 1, 0 give 0.7071, -0.7071; first turns share the state 0 and returns
        0.95, 0: the same again; the last turns are each alone in theirs.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0, 0.0]], anchors=[[0, 1], [0, 2]])
        [[1.4142, 0.7071], [-1.4142, -0.7071]]
        """,
    ),
    "igpo": Preset(
        Method(_TURNS, CreditSum((Term(order="normalise_first", gamma=1.0, ddof=0),)), PolicyLoss(**_VERL)),
        "Information Gain-based Policy Optimization, arXiv 2510.14967",
        """
        Rewards of all turns of the group are normalised together, then summed to returns. Its rewards are gains of
        information, which need the policy's probability of the truth; ours are of format and execution. Deviation and
        loss are of the authors' core_algos.py and ppo_trainer.yaml (github.com/GuoqingWang1/IGPO), which names no
        aggregation: token-mean is the default of their functions. There a turn of reward 0 is none; here it counts. By
        hand: rewards 0, 1, 0; mean 1/3, deviation 0.4714: -0.7071, 1.4142, -0.7071.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0]])
        [[0.7071, 1.4142], [-0.7071]]
        """,
    ),
    "simpletir": Preset(
        Method(_OUTCOME, _GRPO, PolicyLoss(dual_clip=3.0, aggregation="seq-mean-token-mean", mask_void_turns=True)),
        "SimpleTIR, arXiv 2509.02479",
        """
        GRPO, with trajectories that have a void turn (no call and no answer) out of the loss but in the statistics.
        Clips 0.2 / 0.28, dual clip 3 and no KL are of the authors' simpletir_trainer.yaml
        (github.com/ltzheng/SimpleTIR). It leaves the aggregation to verl, whose default is token-mean; ours is GRPO's.
        By hand: outcomes 1, 0; mean 1/2, deviation 0.7071.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0]])
        [[0.7071, 0.7071], [-0.7071]]
        """,
    ),
}
METHODS: dict[str, Method] = {name: preset.method for name, preset in PRESETS.items()}

# The two other methods called GTPO, which are no presets: what of them the credit covers.
NAMESAKES = {
    "GTPO and GRPO-S, arXiv 2508.04349": (
        "rewards shaped by entropy. GRPO-S: give the shaped reward of a sequence as its outcome, with "
        'a term of quantity = "outcome", population = "trajectories". GTPO gives every token a reward of its own: not '
        "covered."
    ),
    "GTPO, arXiv 2508.03772": (
        "its advantage is that of grpo. It also spares tokens that stand at one place in right and wrong completions, "
        "and leaves completions of high entropy out: not covered, these are masks for the loss."
    ),
}

_EXAMPLE = ">>> from gtpo.credit import group_advantages\n>>> credit = METHODS[{name!r}].credit\n"
__test__ = {name: _EXAMPLE.format(name=name) + textwrap.dedent(preset.notes) for name, preset in PRESETS.items()}
