"""How an instruction is joined with its text. It imports nothing: flags are checked by it as well."""

PLAIN = "{}{}"
# Types of lines whose passages begin as their query does, where FlagEmbedding takes each batch of one set.
SYMMETRIC = ("symmetric_sts", "symmetric_clustering")


def is_format(form: str) -> bool:
    """Whether a format has two places, the instruction's and, at its end, the text's: a model's prompt stands before a text."""
    return form.count("{}") == 2 and form.endswith("{}") and form.count("{") == form.count("}") == 2


def before(form: str, instruction: str) -> str:
    r"""What stands before a text: the format's beginning with the instruction in its place, `\n` being a line break."""
    first, between, _ = form.replace("\\n", "\n").split("{}")
    return first + instruction + between
