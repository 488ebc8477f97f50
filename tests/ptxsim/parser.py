"""PTX text to modules, kernels and instructions.

`Module.parse` reads declarations only; a function's body stays text until `Function.body` is
asked for, because a CUTLASS module has hundreds of thousands of lines and a launch needs one
kernel. Registers and labels are resolved here, scopes of inline assembly included.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .errors import ParseError

_SIZES = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "b128": 16, "pred": 1}


def type_size(name: str) -> int:
    """Bytes of a PTX type such as "u32", "f16x2" or "pred"."""
    if name in _SIZES:
        return _SIZES[name]
    match = re.fullmatch(r"[a-z]+(\d+)(?:x(\d))?", name)
    if not match:
        raise ParseError(f"unknown type .{name}")
    return int(match[1]) * int(match[2] or 1) // 8


# Operands.
class Reg(NamedTuple):
    index: int


class Special(NamedTuple):
    name: str  # "%tid.x"


class Imm(NamedTuple):
    value: int  # raw bits for floats
    kind: str  # "i", "f" (32-bit pattern) or "d" (64-bit pattern)


class Sym(NamedTuple):
    name: str
    offset: int


class Mem(NamedTuple):
    base: Reg | Imm | Sym
    offset: int


class Vec(NamedTuple):
    items: tuple


class Pair(NamedTuple):
    first: object
    second: object


class Not(NamedTuple):
    operand: Reg


class Args(NamedTuple):
    items: tuple


class Sink(NamedTuple):
    pass


@dataclass
class Instr:
    """One instruction: `parts` is the opcode split at dots."""

    parts: tuple[str, ...]
    operands: list
    guard: tuple[int, bool] | None  # register, negated
    line: int
    source: tuple[tuple[int, int], ...]  # (file index, line), then where that was inlined
    text: str

    @property
    def op(self) -> str:
        return self.parts[0]


@dataclass
class Variable:
    """A .global, .const, .shared or .local variable."""

    name: str
    space: str
    size: int
    align: int
    init: str | None = None
    elem: str = "b8"
    extern: bool = False


@dataclass
class Param:
    name: str
    offset: int
    size: int
    align: int


@dataclass
class Body:
    """A parsed function body."""

    instrs: list[Instr] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # unique label -> instruction index
    tables: dict[str, list[str]] = field(default_factory=dict)  # .branchtargets
    regs: list[str] = field(default_factory=list)  # type of each register
    reg_names: list[str] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)  # .local, .shared, .param


_COMMENT = re.compile(r'"[^"\n]*"|//[^\n]*|/\*.*?\*/', re.S)
_NAME = r"[A-Za-z_$%][\w$]*"


def _strip_comments(text: str) -> str:
    def blank(match: re.Match) -> str:
        found = match[0]
        return found if found[0] == '"' else "\n" * found.count("\n")

    return _COMMENT.sub(blank, text)


_VARIABLE = re.compile(
    rf"\.(?P<space>global|const|shared|local|param)\s+(?P<attrs>(?:\.\w+\s+(?:\d+\s+)?"
    rf"|\.attribute\([^)]*\)\s*)*)(?P<name>{_NAME})(?P<dims>(?:\[\d*\])*)\s*(?:=\s*(?P<init>.*))?$",
    re.S,
)


def _parse_variable(text: str) -> Variable | None:
    match = _VARIABLE.search(text.strip())
    if not match:
        return None
    attrs = match["attrs"]
    types = [t for t in re.findall(r"\.(\w+)", attrs) if re.fullmatch(r"[bsuf]\d+(x2)?|pred", t)]
    elem = types[-1] if types else "b8"
    aligned = re.search(r"\.align\s+(\d+)", re.sub(r"\.ptr.*", "", attrs, flags=re.S))
    size = type_size(elem)
    align = int(aligned[1]) if aligned else size
    for vector in re.findall(r"\.v([248])\s", attrs):
        size *= int(vector)
        align = max(align, size)
    dims = re.findall(r"\[(\d*)\]", match["dims"])
    init = match["init"]
    if dims:
        if dims[0] == "" and init is not None:
            dims[0] = str(len(init.strip().strip("{}").split(",")))
        for dim in dims:
            size *= int(dim or 0)
    extern = text.lstrip().startswith(".extern")
    return Variable(match["name"], match["space"], size, align, init, elem, extern)


@dataclass
class Function:
    """A .func or .entry; the body is parsed on first use."""

    name: str
    is_entry: bool
    head: str
    text: str | None  # between the braces; None for an extern declaration
    line: int
    module: Module

    def _param_list(self, text: str) -> list[Variable]:
        return [v for v in (_parse_variable(p) for p in text.split(",")) if v]

    @cached_property
    def _heads(self) -> tuple[list[Variable], list[Variable]]:
        lists = re.findall(r"\(([^()]*)\)", re.sub(r"\.attribute\([^)]*\)", "", self.head))
        before = self.head.split(self.name)[0]
        results = self._param_list(lists[0]) if "(" in before else []
        rest = lists[1:] if "(" in before else lists
        return results, self._param_list(rest[0]) if rest else []

    @property
    def results(self) -> list[Variable]:
        return self._heads[0]

    @cached_property
    def params(self) -> list[Param]:
        out, offset = [], 0
        for v in self._heads[1]:
            offset = -(-offset // v.align) * v.align
            out.append(Param(v.name, offset, v.size, v.align))
            offset += v.size
        return out

    @property
    def param_bytes(self) -> int:
        return self.params[-1].offset + self.params[-1].size if self.params else 0

    def _dims(self, directive: str) -> tuple[int, int, int] | None:
        match = re.search(rf"\.{directive}\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", self.head)
        return tuple(int(g or 1) for g in match.groups()) if match else None  # type: ignore

    @property
    def reqntid(self) -> tuple[int, int, int] | None:
        return self._dims("reqntid")

    @property
    def maxntid(self) -> tuple[int, int, int] | None:
        return self._dims("maxntid")

    @cached_property
    def callees(self) -> list[Function]:
        """Functions with a body that this one may call, itself excluded, transitively."""
        seen: dict[str, Function] = {}
        todo = [self]
        while todo:
            for name in re.findall(
                rf"\bcall[\w.]*\s+(?:\([^)]*\)\s*,\s*)?({_NAME})", todo.pop().text
            ):
                found = self.module.functions.get(name)
                if found and found.text is not None and name not in seen and found is not self:
                    seen[name] = found
                    todo.append(found)
        return list(seen.values())

    @cached_property
    def shared_layout(self) -> tuple[dict[str, int], int]:
        """Offsets of the static shared variables this function uses, and their total size."""
        offset, layout = 0, {}
        texts = [f.text for f in [self, *self.callees]]
        variables = [
            v
            for text in texts
            for d in re.findall(r"(?<![\w.])(\.shared\s[^;]*);", text)
            if (v := _parse_variable(d))
        ]
        words: set[str] | None = None
        for v in self.module.variables.values():
            if v.space == "shared" and not v.extern:
                words = words or set(re.findall(_NAME, " ".join(texts)))
                if v.name in words:
                    variables.append(v)
        for v in variables:
            if v.name not in layout:
                offset = -(-offset // v.align) * v.align
                layout[v.name] = offset
                offset += v.size
        return layout, offset

    @property
    def static_smem(self) -> int:
        return self.shared_layout[1]

    @cached_property
    def body(self) -> Body:
        return _BodyParser(self).parse()


Kernel = Function


@dataclass
class Module:
    """One PTX module."""

    target: str
    functions: dict[str, Function] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)

    @property
    def kernels(self) -> dict[str, Kernel]:
        return {n: f for n, f in self.functions.items() if f.is_entry and f.text is not None}

    @classmethod
    def parse(cls, ptx_text: str) -> Module:
        text = _strip_comments(ptx_text)
        target = re.search(r"^\s*\.target\s+([\w]+)", text, re.M)
        module = cls(target[1] if target else "sm_80")
        for index, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M):
            module.files[int(index)] = name
        item_end, brace = re.compile(r"[;{]"), re.compile(r"[{}]")
        skip = re.compile(
            r'\s*(?:\.(?:version|target|address_size)\s[^\n]*|\.file\s+\d+\s+"[^\n]*)\n'
        )
        pos, line, counted = 0, 1, 0
        while True:
            while skipped := skip.match(text, pos):
                pos = skipped.end()
            end = item_end.search(text, pos)
            if not end:
                return module
            head = text[pos : end.start()]
            if end[0] == "{":
                depth, close = 1, end.end()
                while depth:
                    found = brace.search(text, close)
                    if not found:
                        raise ParseError("unbalanced braces", item=head.strip()[:80])
                    depth += 1 if found[0] == "{" else -1
                    close = found.end()
                if re.search(r"\.(entry|func)\b", head):
                    line += text.count("\n", counted, end.end())
                    counted = end.end()
                    module._add_function(head, text[end.end() : close - 1], line)
                elif "=" in head:
                    close = text.index(";", close) + 1
                    module._add_variable(text[pos : close - 1])
                pos = close
            else:
                if re.search(r"\.(entry|func)\b", head):
                    module._add_function(head, None, 0)
                else:
                    module._add_variable(head)
                pos = end.end()

    def _add_function(self, head: str, text: str | None, line: int) -> None:
        match = re.search(rf"\.(entry|func)\s*(?:\([^)]*\)\s*)?({_NAME})", head)
        if not match:
            raise ParseError("cannot read a function header", head=head.strip()[:120])
        name = match[2]
        if text is None and name in self.functions:
            return
        self.functions[name] = Function(name, match[1] == "entry", head, text, line, self)

    def _add_variable(self, text: str) -> None:
        variable = _parse_variable(text)
        if variable:
            self.variables[variable.name] = variable


_TOKEN = re.compile(
    rf"\s*(?:(?P<loc>\.loc\s[^\n]*)|(?P<label>{_NAME}):(?!:)|(?P<brace>[{{}}])"
    r"|(?P<statement>[^;]+);|(?P<end>$))"
)
_OPERAND_SPLIT = re.compile(r",(?![^\[{(]*[\]})])")
_INSTR = re.compile(rf"(?:@(!?)\s*({_NAME})\s+)?([\w.:]+)\s*(.*)$", re.S)
_SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid|laneid|warpid"
    r"|nwarpid|smid|nsmid|gridid|clock|clock_hi|clock64|globaltimer|globaltimer_lo"
    r"|globaltimer_hi|lanemask_(?:eq|le|lt|ge|gt)|cluster_ctarank|cluster_nctarank"
    r"|is_explicit_cluster|dynamic_smem_size|total_smem_size|aggr_smem_size"
    r"|current_graph_exec|envreg\d+|reserved_smem_offset_\w+|reserved_smem_\w+)(\.[xyzw])?$"
)


def _spaces(text: str) -> str:
    return re.sub(r"\$\S+|\s+", " ", text)


class _BodyParser:
    def __init__(self, function: Function) -> None:
        self.function = function
        self.body = Body()
        # Innermost scope last; each is (names, ranges): "%r<9>" declares a range.
        self.scopes: list[tuple[str, dict[str, int], dict[str, tuple[str, int]]]] = []
        self.scope_count = 0
        self.inlined: dict[tuple, tuple] = {}
        self.pending: list[tuple[Instr, list[str]]] = []
        self.scope_labels: set[str] = set()

    def parse(self) -> Body:
        self._push()
        text, pos, line, counted = self.function.text, 0, self.function.line, 0
        source: tuple[tuple[int, int], ...] = ()
        while True:
            match = _TOKEN.match(text, pos)
            if not match:
                raise ParseError("cannot read statement", text=text[pos : pos + 80])
            start = match.start(match.lastgroup)
            line += text.count("\n", counted, start)
            counted = start
            pos = match.end()
            if match["statement"] is not None:
                self._statement(match["statement"], line, source)
            elif match["loc"]:
                source = self._location(match["loc"]) or source
            elif match["label"]:
                self._label(match["label"])
            elif match["brace"]:
                if match["brace"] == "{":
                    self._push()
                else:
                    self.scopes.pop()
            else:
                break
        self._resolve_labels()
        return self.body

    def _location(self, text: str) -> tuple[tuple[int, int], ...]:
        """A .loc with the chain of calls it was inlined through."""
        numbers = [tuple(map(int, n)) for n in re.findall(r"(\d+) (\d+) (\d+)", _spaces(text))]
        if numbers[0][1] == 0:  # code of the compiler's own; the last real line says more
            return ()
        if len(numbers) > 1:
            self.inlined[numbers[0]] = numbers[1]
        chain, at = [], numbers[0]
        while at and len(chain) < 16:
            chain.append(at[:2])
            at = self.inlined.get(at)
        return tuple(chain)

    def _push(self) -> None:
        self.scopes.append((f"{self.scope_count}", {}, {}))
        self.scope_count += 1

    def _label(self, name: str) -> None:
        self.body.labels[f"{self.scopes[-1][0]}:{name}"] = len(self.body.instrs)

    def _resolve_labels(self) -> None:
        def resolve(name: str, path: list[str]) -> str:
            for scope in reversed(path):
                if (key := f"{scope}:{name}") in self.body.labels:
                    return key
            raise ParseError(f"label {name} is not defined", function=self.function.name)

        for instr, path in self.pending:
            if instr.op == "bra":
                instr.operands = [Sym(resolve(instr.operands[0].name, path), 0)]
            else:
                for scope in reversed(path):
                    key = f"{scope}:{instr.operands[1].name}"
                    if key in self.body.tables:
                        instr.operands[1] = Args(
                            tuple(Sym(resolve(n, path), 0) for n in self.body.tables[key])
                        )
                        break

    def _statement(self, text: str, line: int, source: tuple) -> None:
        text = " ".join(text.split())
        if text[0] == ".":
            self._directive(text)
            return
        match = _INSTR.match(text)
        if not match:
            raise ParseError("cannot read instruction", line=line, text=text)
        negated, guard, opcode, rest = match.groups()
        operands = [self._operand(o.strip()) for o in _OPERAND_SPLIT.split(rest)] if rest else []
        parts = tuple(p for p in opcode.replace("::", "_").split(".") if p)
        instr = Instr(
            parts,
            operands,
            (self._register(guard).index, bool(negated)) if guard else None,
            line,
            source,
            text,
        )
        if parts[0] in ("bra", "brx"):
            self.pending.append((instr, [s[0] for s in self.scopes]))
        self.body.instrs.append(instr)

    def _directive(self, text: str) -> None:
        word = re.match(r"\.\w+", text)[0]
        if word == ".reg":
            kind, rest = re.match(r"\.reg\s*\.(\w+)\s+(.*)", text).groups()
            if kind in ("v2", "v4"):
                raise ParseError("vector registers are not supported", text=text)
            _, names, ranges = self.scopes[-1]
            for item in rest.split(","):
                item = item.strip()
                if "<" in item:
                    prefix, count = item.rstrip(">").split("<")
                    ranges[prefix] = (kind, int(count))
                else:
                    names[item] = self._new_register(item, kind)
        elif word in (".local", ".shared", ".param", ".extern", ".const", ".global"):
            variable = _parse_variable(text)
            if not variable:
                raise ParseError("cannot read declaration", text=text)
            # Inline scopes reuse names; one declaration per scope keeps them apart.
            name = variable.name
            if variable.space == "param":
                name = variable.name = f"{name}@{self.scopes[-1][0]}"
            self.body.variables[name] = variable
        elif word == ".branchtargets":
            last = [k for k, v in self.body.labels.items() if v == len(self.body.instrs)][-1]
            self.body.tables[last] = [t.strip() for t in text.split(None, 1)[1].split(",")]
        # .pragma, .callprototype and .maxn... directives change nothing here.

    def _new_register(self, name: str, kind: str) -> int:
        self.body.regs.append(kind)
        self.body.reg_names.append(name)
        return len(self.body.regs) - 1

    def _register(self, name: str) -> Reg | None:
        for _, names, ranges in reversed(self.scopes):
            if name in names:
                return Reg(names[name])
            if not ranges:
                continue
            match = re.fullmatch(r"(.*?)(\d+)", name)
            if match and (declared := ranges.get(match[1])) and int(match[2]) < declared[1]:
                names[name] = self._new_register(name, declared[0])
                return Reg(names[name])
        return None

    def _operand(self, text: str) -> object:
        first = text[0]
        if first == "%" or first.isalpha() or first in "$_":
            if text == "_":
                return Sink()
            if "|" in text:
                a, b = text.split("|")
                return Pair(self._operand(a.strip()), self._operand(b.strip()))
            if (reg := self._register(text)) is not None:
                return reg
            if _SPECIAL.match(text):
                return Special(text)
            if text == "WARP_SZ":
                return Imm(32, "i")
            name, _, offset = text.partition("+")
            return Sym(self._symbol(name.strip()), int(offset, 0) if offset else 0)
        if first == "[":
            inside = text[1:-1].strip()
            match = re.fullmatch(r"(.+?)\s*(?:\+\s*(-?\s*\w+)|(-\s*\w+))?", inside)
            offset = match[2] or match[3] or "0"
            return Mem(self._operand(match[1]), int(offset.replace(" ", "").rstrip("U"), 0))
        if first == "{":
            inside = text[1:-1].strip()
            return Vec(tuple(self._operand(o.strip()) for o in inside.split(",")))
        if first == "(":
            inside = text[1:-1].strip()
            return Args(
                tuple(self._operand(o.strip()) for o in inside.split(",")) if inside else ()
            )
        if first == "!":
            return Not(self._register(text[1:].strip()))
        if first == "-" and text[1:2] == "%":
            raise ParseError("negated register operand", text=text)
        return _number(text)

    def _symbol(self, name: str) -> str:
        for scope, _, _ in reversed(self.scopes):
            if (key := f"{name}@{scope}") in self.body.variables:
                return key
        return name


def _number(text: str) -> Imm:
    if match := re.fullmatch(r"(-?)0[fF]([0-9a-fA-F]{8})", text):
        return Imm(int(match[2], 16) ^ (0x80000000 if match[1] else 0), "f")
    if match := re.fullmatch(r"(-?)0[dD]([0-9a-fA-F]{16})", text):
        return Imm(int(match[2], 16) ^ (1 << 63 if match[1] else 0), "d")
    if (
        re.fullmatch(r"-?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?", text)
        and not text.lstrip("-").isdigit()
    ):
        return Imm(int(np.float64(float(text)).view(np.uint64)), "d")
    text = text.rstrip("uU")
    negative = text.startswith("-")
    digits = text.lstrip("-").strip()
    if re.fullmatch(r"0[0-7]+", digits):
        value = int(digits, 8)
    else:
        value = int(digits, 0)
    return Imm(-value if negative else value, "i")
