"""Reward, credit and loss of a method in a line each, read off its fields."""

from gtpo.methods.records import CreditSum, PolicyLoss, RewardRule, Term


def describe_reward(rule: RewardRule) -> str:
    """What a turn is paid, read off the fields.

    >>> from gtpo.methods import METHODS
    >>> describe_reward(METHODS["gtpo"].reward)
    'outcome or similarity 0.5, format -0.1'
    >>> describe_reward(METHODS["grpo"].reward)
    'outcome, 0 with a format fault'
    """
    parts = [f"outcome or similarity {rule.similarity_alpha:g}" if rule.similarity_alpha else "outcome"]
    parts += ["0 with a format fault"] if rule.outcome_needs_format else []
    parts += [f"format -{rule.format_penalty:g}"] if rule.format_penalty and rule.format_faults else []
    if rule.execution_bonus or rule.execution_penalty:
        parts += [f"execution {rule.execution_bonus:g} / -{rule.execution_penalty:g}"]
    if rule.format_faults != RewardRule.format_faults:
        parts += [f"format faults: {' and '.join(rule.format_faults).replace('_', ' ') or 'none'}"]
    return ", ".join(parts)


def describe_credit(credit: CreditSum) -> str:
    """The formula of a credit, read off its fields.

    >>> from gtpo.methods import METHODS
    >>> describe_credit(METHODS["matchtir"].credit)
    '0.5 norm[group, one a trajectory](trajectory return) + 0.5 norm[group and turn](turn return, gamma 0.9)'
    """
    formula = " + ".join(_describe_term(term) for term in credit.terms)
    formula = f"average({formula})" if credit.average else formula
    return f"whiten[tokens of the batch]({formula})" if credit.whiten else formula


def describe_loss(loss: PolicyLoss) -> str:
    """The settings of a loss in one line.

    >>> from gtpo.methods import METHODS
    >>> describe_loss(METHODS["gtpo"].loss)
    'token ratio, ppo, clip 0.2 / 0.28, token-mean'
    """
    parts: list[str] = [loss.surrogate]
    if loss.surrogate != "reinforce":
        parts = [f"{loss.ratio_level} ratio" + " to the sampler" * (loss.ratio_to == "sampler"), *parts]
    if loss.surrogate not in ("reinforce", "sapo", "vespo"):
        parts += [f"clip {loss.clip_low:g} / {loss.clip_high:g}"]
    parts += [f"gate {' / '.join(f'{x:g}' for x in loss.gate)}"] if loss.gate else []
    parts += [f"dual clip {loss.dual_clip:g}"] if loss.dual_clip is not None else []
    parts += [loss.aggregation]
    if loss.kl != "none":
        parts += [f"{loss.kl} KL {loss.kl_coef:g}" + " to the sampler" * (loss.kl_reference == "sampler")]
    parts += [f"entropy {loss.entropy_coef:g}"] if loss.entropy_coef else []
    parts += [f"{loss.rollout_correction} rollout weights"] if loss.rollout_correction != "none" else []
    parts += ["truncated masked"] if loss.mask_truncated else []
    parts += ["void turns masked"] if loss.mask_void_turns else []
    return ", ".join(parts)


def _describe_term(term: Term) -> str:
    values = term.quantity.replace("_", " ") + (f" of {term.reward}" if term.reward else "")
    discounted = term.quantity in ("turn_return", "trajectory_return") and term.gamma != 1
    values += f", gamma {term.gamma:g}" if discounted and term.order == "discount_first" else ""
    if term.scope != "none":
        entries = {"turns": "", "trajectories": ", one a trajectory", "tokens": ", one a token"}[term.population]
        if term.centre == "none":
            operation = "scale"
        elif term.scale == "mean":
            operation = "share of the mean"
        elif term.scale == "none":
            operation = "centre" if term.centre == "mean" else "leave-one-out"
        else:
            operation = "norm" if term.centre == "mean" else "leave-one-out norm"
        entries += ", ddof 0" if term.scale == "std" and term.ddof == 0 else ""
        entries += ", a lone one kept" if term.singleton == "keep" else ""
        inner = "turn reward" if term.order == "normalise_first" else values
        scope = term.scope.replace("_", " and ") + (f" and {term.context} before" if term.context else "")
        values = f"{operation}[{scope}{entries}]({inner})"
    elif term.order == "normalise_first":
        values = "turn reward"
    if term.order == "normalise_first":
        values = f"returns(gamma {term.gamma:g}) of {values}"
    values += " on turns with calls" if term.turns == "with_calls" else ""
    values += ", of the others 0" if term.others == "zero" else ""
    return values if term.weight == 1 else f"{term.weight:g} {values}"
