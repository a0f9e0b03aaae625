"""Read a compiled program's text: its kernels, the bytes that each moves, and its FLOPs.

The text is XLA's optimized and scheduled HLO for a GPU (`compiled.as_text()`). Each instruction
that is not free is a kernel; loops are followed with their trip counts. Of an array that a kernel
only slices, the slice is read; of an update in place, the update is written.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
SIZES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "token": 0}
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
}
# Operations in a fusion that read as many elements as they give.
ELEMENT_WISE = {"bitcast", "convert", "select", "copy", "reshape", "add", "multiply", "subtract"}
ELEMENT_WISE |= {"maximum", "exponential", "negate", "compare", "and", "clamp"}
SLICES = {"dynamic-slice", "slice", "gather"}
UPDATES = {"dynamic-update-slice", "scatter"}
WORKSPACE = ("s8", "u8")  # dtypes of the second result of cuBLAS's and cuDNN's calls
TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
Array = tuple[str, tuple[int, ...]]  # dtype, dimensions


class Instruction(NamedTuple):
    name: str
    shape: str
    operation: str
    operands: list[str]
    attributes: str
    is_root: bool

    @property
    def arrays(self) -> list[Array]:
        """Those that it gives, without cuBLAS's and cuDNN's workspace."""
        found = re.findall(r"(\w+)\[([\d,]*)\]", self.shape)
        arrays = [(d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in found]
        first_only = self.operation in ("custom-call", "fusion")
        return [
            (dtype, dims)
            for place, (dtype, dims) in enumerate(arrays)
            if dtype in SIZES and not (first_only and place and dtype in WORKSPACE)
        ]

    @property
    def elements(self) -> int:
        return sum(math.prod(dims) for _, dims in self.arrays)

    @property
    def bytes(self) -> int:
        return sum(SIZES[dtype] * math.prod(dims) for dtype, dims in self.arrays)

    def called(self, attribute: str) -> str:
        """The computation that an attribute names."""
        found = re.search(rf"{attribute}=%?([\w.\-]+)", self.attributes)
        assert found, f"{self.name} has no {attribute}"
        return found[1]


class Product(NamedTuple):
    """A matrix product's sizes."""

    batch: int
    M: int
    N: int
    K: int
    dtype: str  # of the operands

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.M * self.N * self.K


class Kernel(NamedTuple):
    """An instruction that runs as a kernel, in one place of the program."""

    names: set[str]  # its own and those of what it fuses; a trace names a kernel by one of them
    times: int  # that it runs in one execution of the program
    in_loop: bool
    read: int  # bytes, each time
    written: int
    product: Product | None
    attention: str | None  # 'forward' or 'backward' if it is cuDNN's
    touched: list[Array]  # what it reads and gives
    sources: str  # the functions that it comes from, 'file.function, ...'
    operations: set[str]


class Program:
    """The computations of a program."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self._tables: dict[str, dict[int, str]] = {name: {} for name in TABLES}
        self._read(text)

    def _read(self, text: str) -> None:
        table: dict[int, str] | None = None
        body: dict[str, Instruction] | None = None
        for raw in text.split("\n"):
            line = re.sub(r"/\*.*?\*/", "", raw.strip())
            if line in self._tables:
                table = self._tables[line]
            elif raw.startswith(("%", "ENTRY")) and line.endswith("{"):
                name = line.removeprefix("ENTRY ").removeprefix("%").split(" ")[0]
                body = self.computations[name] = {}
                self.entry = name if raw.startswith("ENTRY") else self.entry
            elif line == "}":
                body = None
            elif body is not None and (instruction := parse_instruction(line)):
                body[instruction.name] = instruction
            elif table is not None and (entry := re.match(r"(\d+) (.*)", line)):
                table[int(entry[1])] = entry[2].strip('"')

    def kernels(self) -> Iterator[Kernel]:
        """Every kernel in the order of the program, once for each place it stands in."""
        yield from self._kernels(self.entry, 1, False)

    def _kernels(self, computation: str, times: int, in_loop: bool) -> Iterator[Kernel]:
        for x in self.computations[computation].values():
            if x.operation == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', x.attributes)
                more = times * int(trips[1] if trips else 1)
                yield from self._kernels(x.called("body"), more, True)
            elif x.operation in ("call", "conditional"):
                names = r"(?:to_apply|true_computation|false_computation)=%?([\w.\-]+)"
                branches = re.search(r"branch_computations=\{([^}]*)\}", x.attributes)
                listed = re.findall(r"[\w.\-]+", branches[1]) if branches else []
                for name in [*re.findall(names, x.attributes), *listed]:
                    yield from self._kernels(name, times, in_loop)
            elif x.operation not in FREE:
                yield self._kernel(x, self.computations[computation], times, in_loop)

    def _kernel(
        self, x: Instruction, body: dict[str, Instruction], times: int, in_loop: bool
    ) -> Kernel:
        inner = self.computations[x.called("calls")] if x.operation == "fusion" else {x.name: x}
        calls = [y for y in inner.values() if y.operation == "custom-call"]
        library = calls[0].attributes if calls else ""
        scope = inner if x.operation == "fusion" else body
        product = product_of(calls[0], scope) if "__cublas" in library else None
        back = "backward" if "Backward" in library else "forward"
        read, written = _moved(x, inner, body)
        operands = [body[name] for name in x.operands if name in body]
        return Kernel(
            names={x.name, *inner},
            times=times,
            in_loop=in_loop,
            read=read,
            written=written,
            product=product,
            attention=back if "__cudnn$fmha" in library else None,
            touched=[array for y in (x, *operands) for array in y.arrays],
            sources=", ".join(sorted({s for y in inner.values() if (s := self._source(y))})),
            operations={y.operation for y in inner.values()},
        )

    def _source(self, x: Instruction) -> str | None:
        """'file.function' of the innermost frame that an instruction comes from."""
        found = re.search(r"stack_frame_id=(\d+)", x.attributes)
        if x.operation in (*FREE, "broadcast", "iota") or not found:
            return None
        ids = self._tables["StackFrames"].get(int(found[1]), "")
        location = _number(ids, "file_location_id")
        ids = self._tables["FileLocations"].get(location, "")
        file = self._tables["FileNames"].get(_number(ids, "file_name_id"), "")
        function = self._tables["FunctionNames"].get(_number(ids, "function_name_id"), "")
        name = file.rpartition("/")[2].removesuffix(".py")
        return f"{name}.{function.split('.<locals>')[0]}"


def _number(text: str, name: str) -> int:
    found = re.search(rf"{name}=(\d+)", text)
    return int(found[1]) if found else -1


def parse_instruction(line: str) -> Instruction | None:
    """A line such as `ROOT %name = f32[4]{0} add(%a, %b), attributes`; None if it is none."""
    found = re.match(r"(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    operation, inside = rest[:start], rest[start:end]
    operands = [] if operation in ("constant", "parameter") else re.findall(r"%([\w.\-]+)", inside)
    return Instruction(found[2], shape, operation, operands, rest[end + 1 :], bool(found[1]))


def _closing(text: str, start: int) -> int:
    """The position of the parenthesis that closes the one at `start`."""
    depth = 0
    for k in range(start, len(text)):
        depth += (text[k] == "(") - (text[k] == ")")
        if depth == 0:
            return k
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")


def product_of(call: Instruction, body: dict[str, Instruction]) -> Product:
    """The sizes of a cuBLAS call."""
    (dtype, left), (_, right) = (body[name].arrays[0] for name in call.operands[:2])

    def dims(name: str) -> list[int]:
        found = re.search(rf'"{name}_dimensions":\[([^\]]*)\]', call.attributes)
        return [int(n) for n in re.findall(r"\d+", found[1])] if found else []

    def rest(shape: tuple[int, ...], side: str) -> int:
        used = {*dims(f"{side}_contracting"), *dims(f"{side}_batch")}
        return math.prod(n for k, n in enumerate(shape) if k not in used)

    return Product(
        batch=math.prod(left[k] for k in dims("lhs_batch")),
        M=rest(left, "lhs"),
        N=rest(right, "rhs"),
        K=math.prod(left[k] for k in dims("lhs_contracting")),
        dtype=dtype,
    )


# ---------------------------------------------------------------- bytes


def _moved(
    x: Instruction, inner: dict[str, Instruction], body: dict[str, Instruction]
) -> tuple[int, int]:
    """Bytes that an instruction reads and writes."""
    if x.operation != "fusion":
        return sum(body[name].bytes for name in x.operands if name in body), x.bytes
    users: dict[str, list[tuple[Instruction, int]]] = defaultdict(list)
    for y in inner.values():
        for place, name in enumerate(y.operands):
            users[name].append((y, place))
    read = sum(_read(y, users, inner) for y in inner.values() if y.operation == "parameter")
    scatters = [y for y in inner.values() if y.operation == "scatter"]
    if scatters:  # each update reads its place and writes it
        updates = sum(inner[y.operands[-1]].bytes for y in scatters)
        return read + updates, updates
    root = next(y for y in inner.values() if y.is_root)
    return read, _written(root, inner)


def _read(
    parameter: Instruction,
    users: dict[str, list[tuple[Instruction, int]]],
    inner: dict[str, Instruction],
) -> int:
    if len(parameter.arrays) != 1 or not users[parameter.name]:
        return parameter.bytes
    sliced = _sliced(parameter.name, users, inner)
    width = SIZES[parameter.arrays[0][0]]
    return parameter.bytes if sliced is None else min(parameter.bytes, width * sliced)


def _sliced(
    name: str, users: dict[str, list[tuple[Instruction, int]]], inner: dict[str, Instruction]
) -> int | None:
    """Elements of an array that are read, None for all."""
    total = 0
    for user, place in users[name]:
        if place == 0 and user.operation in SLICES:
            total += user.elements
        elif place == 0 and user.operation in UPDATES:
            continue
        elif user.operation in ELEMENT_WISE and not user.is_root:
            more = _sliced(user.name, users, inner)
            if more is None or user.elements != inner[name].elements:
                return None
            total += more
        else:
            return None
    return total


def _written(x: Instruction, inner: dict[str, Instruction]) -> int:
    if x.operation == "tuple":
        return sum(_written(inner[name], inner) for name in x.operands)
    if x.operation == "get-tuple-element":  # of a library's call, whose second result is workspace
        return 0 if x.arrays[0][0] in WORKSPACE else x.bytes
    if x.operation == "bitcast":
        return _written(inner[x.operands[0]], inner)
    if x.operation == "dynamic-update-slice":
        return inner[x.operands[1]].bytes
    return x.bytes
