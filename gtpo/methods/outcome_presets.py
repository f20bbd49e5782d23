"""Presets of one credit a trajectory; an example worked by hand stands with each, and is run."""

from gtpo.methods.preset import CENTRED, CLIP, GRPO, OUTCOME, TRAJECTORY, Preset
from gtpo.methods.records import CreditSum, Method, PolicyLoss, RewardRule, Term

OUTCOME_PRESETS: dict[str, Preset] = {
    "grpo": Preset(
        Method(OUTCOME, GRPO),
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
        Method(OUTCOME, GRPO, PolicyLoss(**CLIP, aggregation="seq-mean-token-mean", kl="k3", kl_coef=0.04)),
        "Group Relative Policy Optimization, arXiv 2402.03300 (outcome supervision)",
        """
        KL 0.04 is the paper's; it gives no number for its clip: 0.2 is PPO's. By hand: outcomes 1 and 0; mean 1/2,
        deviation 0.7071.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0]])
        [[0.7071, 0.7071], [-0.7071]]
        """,
    ),
    "dr_grpo": Preset(
        Method(OUTCOME, CENTRED, PolicyLoss(**CLIP, aggregation="constant")),
        "Dr. GRPO, arXiv 2503.20783",
        """
        No deviation, no length: outcome minus the group's mean; clip 0.2 is PPO's. By hand: 1 - 1/4 and 0 - 1/4.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0], [0.0], [0.0]])
        [[0.75, 0.75], [-0.25], [-0.25], [-0.25]]
        """,
    ),
    "dapo": Preset(
        Method(OUTCOME, GRPO, PolicyLoss(mask_truncated=True)),
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
            OUTCOME,
            CreditSum((Term(**TRAJECTORY, centre="leave_one_out", scale="none"),)),
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
    "maxrl": Preset(
        Method(
            OUTCOME,
            CreditSum((Term(**TRAJECTORY, scale="mean"),)),
            PolicyLoss(**CLIP),
        ),
        "Maximum Likelihood Reinforcement Learning, arXiv 2602.02710",
        """
        Outcome minus the group's mean, over that mean: a task that is seldom solved counts for more. Where nothing was
        right there is nothing to learn from. For outcomes of 0 or more. The credit is that of the authors'
        core_algos.py (github.com/tajwarfahim/maxrl); the loss is PPO's with the mean over
        tokens, the default of verl, which their code stands on. By hand: 1 / (1/4) - 1 and -1.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0], [0.0], [0.0]])
        [[3.0, 3.0], [-1.0], [-1.0], [-1.0]]
        >>> group_advantages(credit, [[0.0], [0.0]])
        [[0.0], [0.0]]
        """,
    ),
    "gdpo": Preset(
        Method(
            RewardRule(similarity_alpha=0.0),
            CreditSum((Term(**TRAJECTORY, reward="outcome"), Term(**TRAJECTORY, reward="format")), whiten=True),
            PolicyLoss(**CLIP),
        ),
        "Group reward-Decoupled Normalization Policy Optimization, arXiv 2601.05242",
        """
        Each kind of reward is normalised in the group by itself, and the sum is whitened over all tokens of the batch.
        The kinds here are outcome and format; any other is another term. The credit is that of the authors' verl
        (github.com/NVlabs/GDPO) and of TRL's "normalize_then_sum", which whitens over completions; the loss is PPO's.
        By hand: outcomes 1, 0, 0 give 1.1547 and -0.5774 twice, format 0, 0, -0.1 gives 0.5774 twice and
        -1.1547; sums 1.7320, 0, -1.7320 of a token each have the deviation 1.7320.

        >>> named = {"outcome": [[1.0], [0.0], [0.0]], "format": [[0.0], [0.0], [-0.1]]}
        >>> group_advantages(credit, [[1.0], [0.0], [-0.1]], named=named, digits=3)
        [[1.0], [0.0], [-1.0]]
        """,
    ),
    "reinforce_pp": Preset(
        Method(
            OUTCOME,
            CreditSum(CENTRED.terms, whiten=True),
            PolicyLoss(**CLIP, kl="k2", kl_coef=0.001),
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
            OUTCOME,
            GRPO,
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
        Method(OUTCOME, GRPO, PolicyLoss(surrogate="cispo", clip_low=1.0, clip_high=4.0)),
        "CISPO of MiniMax-M1, arXiv 2506.13585",
        """
        GRPO's credit; the clipped ratio weights the log-prob, so that no token is left out. The paper gives no number
        for its upper bound: 1 + 4.0 is ours. By hand: outcomes 1, 1, 0, 0; mean 1/2, deviation 0.5774.

        >>> group_advantages(credit, [[1.0], [0.0, 1.0], [0.0], [0.0]])
        [[0.866], [0.866, 0.866], [-0.866], [-0.866]]
        """,
    ),
    "sapo": Preset(
        Method(OUTCOME, GRPO, PolicyLoss(surrogate="sapo", gate=(1.0, 1.05), aggregation="seq-mean-token-mean")),
        "Soft Adaptive Policy Optimization, arXiv 2511.20347",
        """
        GRPO's credit; in the loss a sigmoid of the ratio, which never cuts, in the place of the clip. Its two
        temperatures, 1 and 1.05, and the mean are the paper's, as TRL has them. By hand: as for deepseek_grpo.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0]])
        [[0.7071, 0.7071], [-0.7071]]
        """,
    ),
    "vespo": Preset(
        Method(OUTCOME, GRPO, PolicyLoss(surrogate="vespo", ratio_level="sequence", gate=(2.0, 3.0, 3.0, 2.0))),
        "Variational Sequence-Level Soft Policy Optimization, arXiv 2602.10693",
        """
        GRPO's credit; a token weighs w^k exp(lambda (1 - w)), where w is the ratio of the whole sequence, a product and
        no mean: far from 1 it goes to 0 on both sides. Numbers and mean are TRL's, the credit too: the paper's
        own is not known to us. By hand: as for deepseek_grpo.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0]])
        [[0.7071, 0.7071], [-0.7071]]
        """,
    ),
    "dppo": Preset(
        Method(OUTCOME, GRPO, PolicyLoss(surrogate="dppo", ratio_to="sampler", **CLIP)),
        "Divergence Proximal Policy Optimization, arXiv 2602.04879 (binary total variation)",
        """
        GRPO's credit; a token is cut where its probability has moved away from the sampler's by more than 0.2, the way
        that its advantage asks for. Bounds and the ratio to the sampler are those of the authors' Stable-RL as SkyRL,
        TRL and prime-rl restate them; they also bound the ratio, which here is free up to exp(20). By hand: as for
        deepseek_grpo.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0]])
        [[0.7071, 0.7071], [-0.7071]]
        """,
    ),
    "ipo": Preset(
        Method(
            OUTCOME,
            CENTRED,
            PolicyLoss(
                surrogate="ipo",
                ratio_to="sampler",
                clip_low=0.1,
                clip_high=0.1,
                kl="k2",
                kl_coef=0.002,
                kl_reference="sampler",
            ),
        ),
        "INTELLECT Policy Optimization, the loss of github.com/PrimeIntellect-ai/prime-rl",
        """
        A token is kept where its probability is within 0.1 of the sampler's, weighted by their ratio; all are held to
        the sampler by 1e-3 times the square of the log ratio, which is a k2 KL of 0.002. Credit is prime-rl's: outcome
        minus the group's mean. The bound was 0.1 when it became the default there (pull request 3418); later pages say
        0.3. By hand: 1 - 1/4 and -1/4.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0], [0.0], [0.0]])
        [[0.75, 0.75], [-0.25], [-0.25], [-0.25]]
        """,
    ),
    "simpletir": Preset(
        Method(OUTCOME, GRPO, PolicyLoss(dual_clip=3.0, aggregation="seq-mean-token-mean", mask_void_turns=True)),
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
