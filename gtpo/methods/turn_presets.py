"""Presets whose turns have credits of their own; an example worked by hand stands with each, and is run."""

from gtpo.methods.preset import CLIP, DENSE, TRAJECTORY, TURNS, VERL, Preset
from gtpo.methods.records import CreditSum, Method, PolicyLoss, RewardRule, Term

TURN_PRESETS: dict[str, Preset] = {
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
        Method(DENSE),
        "GTPO, arXiv 2511.14846, with execution feedback: ours",
        """
        The credit of gtpo. Turns earn or lose 0.05 by what their code did: by hand, a turn of 0.05 before a right
        answer, another of -0.05 before a wrong one: returns 0.95, 1, -0.05, 0; mean 0.475, deviation 0.5781.

        >>> group_advantages(credit, [[0.05, 1.0], [-0.05, 0.0]])
        [[0.8217, 0.9082], [-0.9082, -0.8217]]
        """,
    ),
    "gtpo_batch": Preset(
        Method(credit=CreditSum((Term(scope="batch"),))),
        "GTPO, arXiv 2511.14846, its equation 7 as a public fork of SkyRL (Ethara-Ai/SkyRL) reads it",
        """
        The same returns, but mean and deviation are those of all turns of the batch: that fork says of equation 7 that
        it normalises globally. The paper's code is not public, so which of the two it means is open; with one task a
        batch it is gtpo, as in this example by hand.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0]])
        [[0.4842, 0.6657], [-1.1499]]
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
    "mt_grpo": Preset(
        Method(
            TURNS,
            CreditSum(
                (
                    Term(quantity="outcome", population="trajectories", eps=1e-4),
                    Term(turns="with_calls", others="zero", quantity="turn_reward", scope="group_turn", eps=1e-4),
                )
            ),
            PolicyLoss(**CLIP),
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
            TURNS,
            CreditSum((Term(**TRAJECTORY, weight=0.5), Term(weight=0.5, gamma=0.9, scope="group_turn"))),
            PolicyLoss(**VERL, aggregation="seq-mean-token-mean"),
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
            TURNS,
            CreditSum((Term(**TRAJECTORY), Term(gamma=0.95, scope="group_anchor"))),
            PolicyLoss(**VERL | {"kl_coef": 0.01}),
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
    "hgpo": Preset(
        Method(
            TURNS,
            CreditSum(
                tuple(Term(weight=2.0 + k, gamma=0.95, scope="group_anchor", context=k, ddof=0) for k in range(3)),
                average=True,
            ),
            PolicyLoss(**VERL | {"kl_coef": 0.01}),
        ),
        "Hierarchy-of-Groups Policy Optimization, arXiv 2602.22817",
        """
        Discounted returns normalised among turns taken in the same state, in the same last two, in the same last three;
        the average of those that say something, in which longer histories weigh more: 2, 3 and 4. No term of the whole
        trajectory. Credit, weights and deviation are those of the authors' core_hgpo.py (recipe/hgpo of verl-agent;
        length_weight_alpha 1, base_group off). Two states before the own one are their history_length of 2; the
        discount and the loss are gigpo's, on whose code theirs stands. By hand, first turns in state 0, second ones
        in state 1: returns 0.95, 0 give 1, -1 and so do 1, 0; the last turn is in the same state, and after
        the same one, so the average of 1 and 1 is taken.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0, 0.0]], anchors=[[0, 1], [0, 1]])
        [[1.0, 1.0], [-1.0, -1.0]]
        >>> group_advantages(credit, [[0.0, 1.0], [0.0, 0.0]], anchors=[[0, 1], [2, 1]])  # other states before
        [[0.0, 1.0], [0.0, -1.0]]
        """,
    ),
    "igpo": Preset(
        Method(TURNS, CreditSum((Term(order="normalise_first", gamma=1.0, ddof=0),)), PolicyLoss(**VERL)),
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
    "kevin": Preset(
        Method(TURNS, CreditSum((Term(gamma=0.4),))),
        "Kevin, arXiv 2507.11948",
        """
        Each turn is paid for the scores from it on, discounted by 0.4, and all turns of the group are normalised
        together: the credit of gtpo with another discount. Its scores are of each kernel that a turn wrote; ours are of
        outcome, format and execution. The loss is gtpo's: what of its own is published (a clip, a mean) we have not
        seen stated. It trains on each turn as a sample of its own. By hand: returns 0.4, 1 and 0; mean 0.4667,
        deviation 0.5033.

        >>> group_advantages(credit, [[0.0, 1.0], [0.0]])
        [[-0.1325, 1.0596], [-0.9272]]
        """,
    ),
}
