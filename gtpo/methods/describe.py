"""Reward, credit and loss of a method in a line each, read off its fields."""

from gtpo.methods.method import Method, Term


def describe_reward(method: Method) -> str:
    """What a turn is paid, read off the fields.

    >>> from gtpo.methods import METHODS
    >>> describe_reward(METHODS["gtpo"])
    'outcome or similarity 0.5, format -0.1'
    >>> describe_reward(METHODS["grpo"])
    'outcome, 0 with a format fault'
    """
    if method.reward == "outcome":
        return "outcome, 0 with a format fault"
    parts = [f"outcome or similarity {method.similarity_alpha:g}" if method.similarity_alpha else "outcome"]
    parts += [f"format -{method.format_penalty:g}"] if method.format_penalty else []
    if method.execution_bonus or method.execution_penalty:
        parts += [f"execution {method.execution_bonus:g} / -{method.execution_penalty:g}"]
    return ", ".join(parts)


def describe_credit(method: Method) -> str:
    """The formula of a credit, read off its fields.

    >>> from gtpo.methods import METHODS
    >>> describe_credit(METHODS["matchtir"])
    '0.5 norm[group, one a trajectory](trajectory return) + 0.5 norm[group and turn](turn return, gamma 0.9)'
    """
    first = Term(**{name: getattr(method, name) for name in Term.__dataclass_fields__ if hasattr(method, name)})
    credit = " + ".join(_describe_term(term) for term in (first, *method.extra_terms))
    return f"whiten[tokens of the batch]({credit})" if method.whiten else credit


def describe_loss(method: Method) -> str:
    """The settings of a loss in one line.

    >>> from gtpo.methods import METHODS
    >>> describe_loss(METHODS["gtpo"])
    'token ratio, ppo, clip 0.2 / 0.28, token-mean'
    """
    parts: list[str] = [method.surrogate]
    if method.surrogate != "reinforce":
        parts = [f"{method.ratio_level} ratio", *parts, f"clip {method.clip_low:g} / {method.clip_high:g}"]
    parts += [f"dual clip {method.dual_clip:g}"] if method.dual_clip is not None else []
    parts += [method.aggregation]
    parts += [f"{method.kl} KL {method.kl_coef:g}"] if method.kl != "none" else []
    parts += [f"entropy {method.entropy_coef:g}"] if method.entropy_coef else []
    parts += [f"{method.rollout_correction} rollout weights"] if method.rollout_correction != "none" else []
    parts += ["truncated masked"] if method.mask_truncated else []
    parts += ["void turns masked"] if method.mask_void_turns else []
    return ", ".join(parts)


def _describe_term(term: Term) -> str:
    values = term.quantity.replace("_", " ")
    discounted = term.quantity in ("turn_return", "trajectory_return") and term.gamma != 1
    values += f", gamma {term.gamma:g}" if discounted and term.order == "discount_first" else ""
    if term.scope != "none":
        entries = {"turns": "", "trajectories": ", one a trajectory", "tokens": ", one a token"}[term.population]
        if term.centre == "none":
            operation = "scale"
        elif term.scale == "none":
            operation = "centre" if term.centre == "mean" else "leave-one-out"
        else:
            operation = "norm" if term.centre == "mean" else "leave-one-out norm"
        entries += ", ddof 0" if term.scale == "std" and term.ddof == 0 else ""
        entries += ", a lone one kept" if term.singleton == "keep" else ""
        inner = "turn reward" if term.order == "normalise_first" else values
        values = f"{operation}[{term.scope.replace('_', ' and ')}{entries}]({inner})"
    elif term.order == "normalise_first":
        values = "turn reward"
    if term.order == "normalise_first":
        values = f"returns(gamma {term.gamma:g}) of {values}"
    values += " on turns with calls" if term.turns == "with_calls" else ""
    values += ", of the others 0" if term.others == "zero" else ""
    return values if term.weight == 1 else f"{term.weight:g} {values}"
