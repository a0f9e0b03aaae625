"""Compatibility with nanoGPT: hints for settings with another name or none, and its config files.

A config file is Python that is read and never executed: it assigns literals and arithmetic to
nanoGPT's names, or to ours; nanoGPT's defaults hold for what it leaves out. `--name=value` on the
command line replaces a line of the file before anything is derived, as in nanoGPT:
`--batch_size=24` keeps gradient_accumulation_steps.
"""

import ast
import operator
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from jaxgpt.config.checks import ConfigError
from jaxgpt.files import read_file, user_path

# Settings of nanoGPT that have no effect here, and what to use instead.
NANOGPT_SETTINGS = {
    "compile": "drop it: every step is compiled by XLA",
    "wandb_log": "use --wandb-project NAME, which logs to Weights & Biases too",
    "wandb_run_name": "use --out-dir: a run is named by its folder",
    "always_save_checkpoint": (
        "drop it: every evaluation saves a checkpoint; --keep-checkpoints N says how many of the "
        "newest are kept besides the best"
    ),
    "eval_only": (
        "use python -m jaxgpt.evaluate; every run evaluates at step 0, at each --eval-interval "
        "and at its end"
    ),
    "backend": "drop it: XLA chooses its own collectives",
}


# Settings that other programs have, and their names here.
OTHER_NAMES = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "bs": "batch_size",
    "micro_batch_size": "batch_size",
    "total_batch_size": "effective_batch_size",
    "global_batch_size": "effective_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps",
    "steps": "max_iters",
    "max_steps": "max_iters",
    "num_iterations": "max_iters",
    "warmup_steps": "warmup_iters",
    "seq_len": "block_size",
    "max_seq_len": "block_size",
    "context_length": "block_size",
    "output_dir": "out_dir",
    "config": "preset",
}
EPOCHS = ("epochs", "num_epochs", "num_train_epochs")


def nanogpt_answer(setting: str, value: object) -> str | None:
    """What to use instead of a setting of another program; None for one that may exist here."""
    if setting in NANOGPT_SETTINGS:
        return f"is nanoGPT's and has no meaning here; {NANOGPT_SETTINGS[setting]}"
    if setting in OTHER_NAMES:
        return f"is called {OTHER_NAMES[setting]} here"
    if setting in EPOCHS:
        return (
            "does not exist here; set max_iters = epochs x tokens of the data / "
            "(effective_batch_size x block_size)"
        )
    if setting == "init_from" and value in ("resume", "scratch"):
        return (
            "is nanoGPT's; drop it: the same command resumes a run from its --out-dir, and a new "
            "--out-dir starts from scratch"
        )
    if setting == "device" and isinstance(value, str) and value.startswith(("cuda", "mps")):
        return (
            "is nanoGPT's; here it is gpu (CUDA_VISIBLE_DEVICES=N chooses among several), cpu or "
            "auto"
        )
    return None


# ---------------------------------------------------------------- config files

# What nanoGPT's train.py assigns before it reads the file. Its out_dir, device and dtype are not
# taken over: a run has a folder of its own, and uses what the machine has.
DEFAULTS: dict[str, Any] = (
    dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, dropout=0.0, bias=False)
    | dict(dataset="openwebtext", batch_size=12, gradient_accumulation_steps=40, max_iters=600000)
    | dict(learning_rate=6e-4, min_lr=6e-5, decay_lr=True, warmup_iters=2000, lr_decay_iters=600000)
    | dict(weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0, init_from="scratch")
    | dict(eval_interval=2000, eval_iters=200, log_interval=1)
    | dict(wandb_log=False, wandb_project="owt", wandb_run_name="gpt2", always_save_checkpoint=True)
    | dict(eval_only=False, compile=True, backend="nccl")
)
NOT_TAKEN_OVER = {"out_dir": "out", "device": "cuda", "dtype": "bfloat16"}
NANOGPT_NAMES = DEFAULTS | NOT_TAKEN_OVER
# Settings without effect, whose values, such as 'run' + str(time.time()), need not be understood.
ANY_VALUE = NANOGPT_SETTINGS.keys() - {"eval_only", "wandb_log"}
WHAT_IS_READ = (
    "config files are read, never executed; assign a literal or arithmetic: min_lr = 6e-4 / 10"
)

OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
LARGEST_EXPONENT = 64  # a number that takes long to compute is a mistake


def is_config_file(word: str) -> bool:
    """Whether a preset's name, or a word of the command line, names a file of nanoGPT's kind."""
    return word.endswith(".py")


def flag_settings(flags: Mapping[str, str | None]) -> dict[str, Any]:
    """The flags that nanoGPT has too, with values of the types that it expects."""
    found = {}
    # wandb_project is a flag of ours, which needs no wandb_log.
    for name in flags.keys() & NANOGPT_NAMES.keys() - {"wandb_project"}:
        value: Any = flags[name]
        with suppress(SyntaxError, ValueError, MemoryError, RecursionError):
            value = ast.literal_eval(flags[name] or "")
        if value != "" and type(value) is type(NANOGPT_NAMES[name]):
            found[name] = value
    return found


def read_settings(path: str, known: Collection[str]) -> dict[str, Any]:
    """What a config file assigns, by the names in it.

    Imports and docstrings are ignored. A name that is neither nanoGPT's nor `known` may be assigned
    if the file uses it.

    Raises:
        ConfigError: for a file that cannot be read, and with file and line for anything else in it.
    """
    try:
        tree = ast.parse(read_file(user_path(path, "--preset")))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name one of nanoGPT's config files") from None
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{path} cannot be read as a config file: {error}") from None
    values: dict[str, Any] = {}
    for statement in tree.body:
        try:
            values |= _assigned(statement, NANOGPT_NAMES | values)
        except (ArithmeticError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {statement.lineno}: {error}") from None
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    read = {name.id for name in names if isinstance(name.ctx, ast.Load)}
    helpers = read - NANOGPT_NAMES.keys() - {*known}
    return {name: value for name, value in values.items() if name not in helpers}


def as_fields(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """nanoGPT's settings, completed with its defaults, as our fields by flat name.

    Raises:
        ConfigError: if they ask for an evaluation alone.
    """
    values = {"gelu": "erf", **DEFAULTS, **settings}
    if values["eval_only"]:
        raise ConfigError(f"{source}: eval_only {nanogpt_answer('eval_only', True)}")
    if "effective_batch_size" in settings and "gradient_accumulation_steps" not in settings:
        del values["gradient_accumulation_steps"]
    for name, value in values.items():
        whole = isinstance(value, float) and value.is_integer()
        if whole and type(DEFAULTS.get(name)) is int:
            values[name] = int(value)  # such as 6e5 or 480 / 12
    if not values["decay_lr"]:
        values["warmup_iters"] = 0  # then nanoGPT has no warm-up either
    if values["init_from"] == "resume":
        values["resume"] = "must"
    if values["init_from"] in ("scratch", "resume"):
        del values["init_from"]
    if values.get("device") == "cuda":
        values["device"] = "gpu"
    if not values["wandb_log"]:
        del values["wandb_project"]
    return {name: value for name, value in values.items() if name not in NANOGPT_SETTINGS}


def unused_settings(settings: Mapping[str, Any]) -> list[str]:
    """A sentence for each setting that means nothing here and is not nanoGPT's default."""
    names = [name for name in settings if name in NANOGPT_SETTINGS and name != "wandb_log"]
    if not settings.get("wandb_log"):
        names = [name for name in names if name != "wandb_run_name"]
    return [
        f"{name} {nanogpt_answer(name, settings[name])}"
        for name in names
        if settings[name] != DEFAULTS[name]
    ]


def _assigned(statement: ast.stmt, known: Mapping[str, Any]) -> dict[str, Any]:
    """The names that a statement assigns, each with the value; raises as `_value` does."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {}
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return {}  # a docstring
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    if not isinstance(statement, ast.Assign) or len(names) < len(targets):
        raise _not_read(statement)
    try:
        return dict.fromkeys(names, _value(statement.value, known))
    except (ArithmeticError, ValueError):
        if not {*names} <= ANY_VALUE:
            raise
        return dict.fromkeys(names)


def _value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """The value of a literal or of arithmetic; raises ValueError or ArithmeticError."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str):
        return node.value
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand, known)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _number(node.left, known), _number(node.right, known)
        if isinstance(node.op, ast.Pow) and abs(right) > LARGEST_EXPONENT:
            raise ValueError(f"{_shown(node)}: the exponent is above {LARGEST_EXPONENT}")
        return OPERATORS[type(node.op)](left, right)
    raise _not_read(node)


def _number(node: ast.expr, known: Mapping[str, Any]) -> int | float:
    value = _value(node, known)
    if isinstance(value, int | float) and abs(value) < 2**63:
        return value
    raise ValueError(f"{_shown(node)}: is not a number of at most 64 bits")


def _not_read(node: ast.AST) -> ValueError:
    return ValueError(f"{_shown(node)}: {WHAT_IS_READ}")


def _shown(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
