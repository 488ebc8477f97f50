"""From a parsed kernel to executable blocks.

Calls are inlined, the control-flow graph is cut into blocks, blocks are ranked so that "lowest
rank first" reconverges divergent threads, and each block is compiled, when first reached, to one
Python function over NumPy arrays (register r of all active threads is the array `r`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from . import alu
from .errors import ParseError
from .parser import (
    Args,
    Imm,
    Instr,
    Kernel,
    Mem,
    Not,
    Pair,
    Reg,
    Sink,
    Special,
    Sym,
    Vec,
    type_size,
)

# Where the shared and local windows lie in the generic address space: beyond any host address.
SHARED_WINDOW = 1 << 56
LOCAL_WINDOW = 1 << 57
PARAM_WINDOW = 1 << 58
SHARED_BASE = 1024  # the first shared address, as on sm_90, so that a null pointer is out of range

# Warp-synchronous instructions: operand index of the member mask, None where it is implied.
# wgmma's synchronise a warpgroup: four warps.
_SYNC = {
    "shfl": -1, "vote": -1, "match": -1, "redux": -1, "elect": -1,
    "mma": None, "ldmatrix": None, "stmatrix": None, "movmatrix": None,
    "wgmma": None,
}  # fmt: skip

_IGNORED = {
    "prefetch", "prefetchu", "applypriority", "discard", "griddepcontrol", "nanosleep", "pmevent",
    "setmaxnreg", "brkpt",
}  # fmt: skip


@dataclass
class Op:
    """What the run-time helpers need to know of one instruction."""

    instr: Instr
    space: str = ""
    size: int = 0  # bytes of one element
    count: int = 1  # elements
    klass: str = ""
    strong: bool = False  # volatile, relaxed, acquire, release: ordered accesses do not race
    acquire: bool = False
    release: bool = False
    noncoherent: bool = False  # ld.global.nc: the bytes must not be written during the launch
    extra: tuple = ()


@dataclass
class Block:
    rank: int = -1
    instrs: list[Instr] = field(default_factory=list)
    term: str = "fall"  # fall, jump, branch, brx, exit, bar, wait
    targets: list[int] = field(default_factory=list)  # block ids, ranks after ordering
    use: int = 0  # registers read before written, as a bit set
    define: int = 0
    live_in: int = 0
    live_out: int = 0
    uses: list[int] = field(default_factory=list)
    saves: int = 0  # registers stored at the end
    fn: Callable | None = None
    # The first instruction is synchronous: itself, its member mask, how many warps go together.
    sync: tuple[Instr, object, int] | None = None
    classes: dict[str, int] = field(default_factory=dict)
    runs: int = 0  # thread-level executions in the current launch
    warp_runs: int = 0
    steps: int = 0


def bits(mask: int) -> list[int]:
    out = []
    while mask:
        low = mask & -mask
        out.append(low.bit_length() - 1)
        mask ^= low
    return out


class _Flattener:
    """Inlines calls: one instruction list, one register file, one symbol table."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.instrs: list[Instr] = []
        self.labels: dict[str, int] = {}
        self.instances = 0

    def add(self, function: Kernel, prefix: str, rename: dict[str, str], depth: int) -> None:
        if depth > 24:
            raise ParseError(f"recursive call of {function.name} is not supported")
        body, program = function.body, self.program
        base = len(program.regs)
        program.regs += body.regs
        program.reg_names += body.reg_names
        symbols = dict(rename)
        for v in body.variables.values():
            if v.space in ("local", "param"):
                name = symbols[v.name] = f"{prefix}{v.name}"
                program.add_local(name, v.size, v.align)

        def operand(o: object) -> object:
            if isinstance(o, Reg):
                return Reg(o.index + base)
            if isinstance(o, Sym):
                return Sym(symbols.get(o.name, o.name), o.offset)
            if isinstance(o, Mem):
                return Mem(operand(o.base), o.offset)
            if isinstance(o, (Vec, Args)):
                return type(o)(tuple(operand(i) for i in o.items))
            if isinstance(o, Pair):
                return Pair(operand(o.first), operand(o.second))
            if isinstance(o, Not):
                return Not(operand(o.operand))
            return o

        by_index: dict[int, list[str]] = {}
        for label, index in body.labels.items():
            by_index.setdefault(index, []).append(f"{prefix}{label}")
        end = f"{prefix}end"
        for index, instr in enumerate(body.instrs):
            for label in by_index.get(index, ()):
                self.labels[label] = len(self.instrs)
            guard = (instr.guard[0] + base, instr.guard[1]) if instr.guard else None
            flat = replace(instr, operands=[operand(o) for o in instr.operands], guard=guard)
            if instr.op in ("bra", "brx"):
                flat.operands = [
                    o if isinstance(o, Reg) else
                    Sym(prefix + o.name, 0) if isinstance(o, Sym) else
                    Args(tuple(Sym(prefix + i.name, 0) for i in instr.operands[1].items))
                    for o in flat.operands
                ]  # fmt: skip
                if instr.op == "bra":
                    flat.operands = [Sym(prefix + instr.operands[0].name, 0)]
            elif instr.op == "ret" and depth:
                flat.parts, flat.operands = ("bra", "uni"), [Sym(end, 0)]
            elif instr.op == "call" and self._call(flat, depth):
                continue
            self.instrs.append(flat)
        for label in by_index.get(len(body.instrs), ()):
            self.labels[label] = len(self.instrs)
        self.labels[end] = len(self.instrs)

    def _call(self, instr: Instr, depth: int) -> bool:
        ops = list(instr.operands)
        results = ops.pop(0).items if isinstance(ops[0], Args) else ()
        name = ops.pop(0)
        actual = ops[0].items if ops and isinstance(ops[0], Args) else ()
        callee = self.program.kernel.module.functions.get(getattr(name, "name", ""))
        if callee is None or callee.text is None or instr.guard:
            return False
        rename = {p.name: a.name for p, a in zip(callee.params, actual)}
        rename |= {p.name: a.name for p, a in zip(callee.results, results)}
        self.instances += 1
        self.add(callee, f"#{self.instances}:", rename, depth + 1)
        return True


def _weak_topological_order(succ: list[list[int]]) -> list[int]:
    """Bourdoncle's order: loops are contiguous and everything after a loop ranks behind it."""
    dfn, stack, num = [0] * len(succ), [], 0
    done = 1 << 60  # larger than any number: nodes of loops are numbered again and again
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 10 * len(succ) + 1000))

    def visit(v: int, order: list) -> int:
        nonlocal num
        stack.append(v)
        num += 1
        dfn[v] = head = num
        loop = False
        for w in succ[v]:
            low = visit(w, order) if dfn[w] == 0 else dfn[w]
            if low <= head:
                head, loop = low, True
        if head == dfn[v]:
            dfn[v] = done
            element = stack.pop()
            if loop:
                while element != v:
                    dfn[element] = 0
                    element = stack.pop()
                inner: list = []
                for w in succ[v]:
                    if dfn[w] == 0:
                        visit(w, inner)
                order.append((v, inner))
            else:
                order.append((v, ()))
        return head

    order: list = []
    visit(0, order)
    sys.setrecursionlimit(limit)
    flat: list[int] = []
    todo = list(order)  # built back to front
    while todo:
        v, inner = todo.pop()
        flat.append(v)
        todo += inner
    return flat


class Program:
    """A kernel ready to run; independent of launch parameters."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.regs: list[str] = []
        self.reg_names: list[str] = []
        self.locals: dict[str, int] = {}
        self.local_size = 0
        self.specials: dict[str, int] = {}
        self.shared, self.static_smem = kernel.shared_layout
        flat = _Flattener(self)
        flat.add(kernel, "", {}, 0)
        self.carry = self._new_reg("pred", "CC")
        self._make_blocks(flat.instrs, flat.labels)
        self._liveness()
        self.home = self._homes()
        self.env: dict[str, object] = {"where": np.where, "np": np}
        self.names = 0
        self.constants: dict[tuple, str] = {}
        self.ops: list[Op] = []
        self.wgmma_regs = {
            r
            for block in self.blocks
            for instr in block.instrs
            if instr.parts[:2] == ("wgmma", "mma_async")
            for o in instr.operands[:2]
            if isinstance(o, Vec)
            for r in _registers(o)
        }
        self.patterns: dict[tuple, int] = {}  # shared-memory wavefronts of address patterns

    def add_local(self, name: str, size: int, align: int) -> None:
        self.local_size = -(-self.local_size // align) * align
        self.locals[name] = self.local_size
        self.local_size += size

    def _new_reg(self, kind: str, name: str) -> int:
        self.regs.append(kind)
        self.reg_names.append(name)
        return len(self.regs) - 1

    def special(self, name: str) -> int:
        if name not in self.specials:
            wide = name in ("%clock64", "%globaltimer", "%gridid", "%current_graph_exec")
            self.specials[name] = self._new_reg("b64" if wide else "b32", name)
        return self.specials[name]

    # --- blocks ----------------------------------------------------------------------------

    def _make_blocks(self, instrs: list[Instr], labels: dict[str, int]) -> None:
        for instr in instrs:
            instr.operands = [self._resolve_special(o) for o in instr.operands]
        leaders = {0, *labels.values()}
        for i, instr in enumerate(instrs):
            if instr.op in ("bra", "brx", "exit", "ret", "trap") or _is_barrier(instr):
                leaders.add(i + 1)
            elif _is_wait(instr):
                leaders |= {i, i + 1}
        synced = 0  # how many warps this block's head has collected
        for i, instr in enumerate(instrs):
            if i in leaders:
                synced = 0
            mask = sync_mask(instr)
            if mask is not False and (mask is not None or synced < _span(instr)):
                leaders.add(i)
                synced = _span(instr) if mask is None else 0
        starts = sorted(x for x in leaders if x < len(instrs))
        index_of = {s: k for k, s in enumerate(starts)}
        ends = [*starts[1:], len(instrs)]
        blocks: list[Block] = []
        count = len(starts)

        def block_at(i: int) -> int:
            return index_of.get(i, count)  # falling off the end returns

        for k, (start, end) in enumerate(zip(starts, ends)):
            block = Block(instrs=instrs[start:end])
            last = instrs[end - 1]
            nxt = k + 1
            if (mask := sync_mask(instrs[start])) is not False:
                block.sync = (instrs[start], mask, _span(instrs[start]))
            if last.op == "bra":
                target = block_at(labels[last.operands[0].name])
                if last.guard is None:
                    block.term, block.targets = "jump", [target]
                else:
                    block.term = "branch"
                    block.targets = [nxt, target] if last.guard[1] else [target, nxt]
            elif last.op == "brx":
                block.term = "brx"
                block.targets = [block_at(labels[t.name]) for t in last.operands[1].items]
            elif last.op in ("exit", "ret", "trap"):
                block.term = "exit"
                block.targets = [nxt] if last.guard else []
            elif _is_barrier(last):
                block.term, block.targets = "bar", [nxt]
            elif _is_wait(last):
                block.term, block.targets = "wait", [nxt]
            else:
                block.targets = [nxt]
            blocks.append(block)
        blocks.append(Block(term="exit"))
        order = _weak_topological_order([b.targets for b in blocks])
        rank = {b: r for r, b in enumerate(order)}
        self.blocks = [blocks[b] for b in order]
        for r, block in enumerate(self.blocks):
            block.rank = r
            block.targets = [rank[t] for t in block.targets]

    def _resolve_special(self, o: object) -> object:
        if isinstance(o, Special):
            return Reg(self.special(o.name))
        if isinstance(o, Vec):
            return Vec(tuple(self._resolve_special(i) for i in o.items))
        return o

    def _liveness(self) -> None:
        for block in self.blocks:
            for instr in block.instrs:
                reads, writes = self.reads_writes(instr)
                for r in reads:
                    if not block.define >> r & 1:
                        block.use |= 1 << r
                for r in writes:
                    block.define |= 1 << r
        changed = True
        while changed:
            changed = False
            for block in reversed(self.blocks):
                out = 0
                for t in block.targets:
                    out |= self.blocks[t].live_in
                if block.term == "wait":
                    out |= block.live_in
                live = block.use | (out & ~block.define)
                if live != block.live_in or out != block.live_out:
                    block.live_in, block.live_out, changed = live, out, True
        for block in self.blocks:
            block.uses = bits(block.use)
            block.saves = block.define & block.live_out

    def reads_writes(self, instr: Instr) -> tuple[list[int], list[int]]:
        """Registers of an instruction; a guarded write also reads what it may keep."""
        operands = instr.operands
        if instr.op in ("call", "brx"):
            operands = [o for o in operands if isinstance(o, Reg)]
        has_dest = _has_dest(instr)
        reads: list[int] = []
        writes: list[int] = []
        for i, o in enumerate(operands):
            target = writes if has_dest and i == 0 else reads
            target += _registers(o)
        if instr.op in ("addc", "subc", "madc"):
            reads.append(self.carry)
        if "cc" in instr.parts:
            writes.append(self.carry)
        if instr.op == "wgmma":
            reads += writes
        if instr.guard:
            reads.append(instr.guard[0])
            reads += writes
        return reads, writes

    def _homes(self) -> list[str]:
        """The NumPy kind each register is kept in: the one its instructions ask for most."""
        votes: list[dict[str, int]] = [{} for _ in self.regs]

        def vote(o: object, k: str) -> None:
            if isinstance(o, Reg):
                votes[o.index][k] = votes[o.index].get(k, 0) + 1

        for block in self.blocks:
            for instr in block.instrs:
                try:
                    sem = alu.semantics(instr)
                except Exception:
                    continue
                if sem:
                    for o, k in zip(instr.operands[1:], sem.ins):
                        vote(o, k)
                    if isinstance(sem.out, str):
                        vote(instr.operands[0], sem.out)
        homes = []
        for kind, vote_of in zip(self.regs, votes):
            default = "b1" if kind == "pred" else f"u{max(type_size(kind), 2)}"
            fitting = {k: n for k, n in vote_of.items() if k[1] == default[1] and k != "b1"}
            best = max(fitting, key=fitting.get) if fitting and default != "b1" else default
            homes.append(best)
        return homes

    # --- compilation -----------------------------------------------------------------------

    def name(self, value: object, prefix: str) -> str:
        self.names += 1
        name = f"{prefix}{self.names}"
        self.env[name] = value
        return name

    def constant(self, value: int, k: str) -> str:
        key = (value, k)
        if key not in self.constants:
            if k == "b1":
                array = np.array([bool(value)])
            else:
                width = 8 * int(k[1])
                array = np.array([value & ((1 << width) - 1)], f"u{k[1]}").view(k)
            self.constants[key] = self.name(array, "k")
        return self.constants[key]

    def compile(self, block: Block) -> None:
        _Compiler(self, block).run()


def _registers(o: object) -> list[int]:
    if isinstance(o, Reg):
        return [o.index]
    if isinstance(o, Mem):
        return _registers(o.base)
    if isinstance(o, (Vec, Args)):
        return [r for i in o.items for r in _registers(i)]
    if isinstance(o, Pair):
        return _registers(o.first) + _registers(o.second)
    if isinstance(o, Not):
        return _registers(o.operand)
    return []


def _has_dest(instr: Instr) -> bool:
    op = instr.op
    if op in (
        "st", "red", "bra", "brx", "exit", "ret", "trap", "membar", "fence", "stmatrix", "call",
        "stackrestore", *_IGNORED,
    ) or op == "cp":  # fmt: skip
        return False
    if op in ("bar", "barrier"):
        return "red" in instr.parts
    if op == "wgmma":
        return instr.parts[1] == "mma_async"
    if op == "mbarrier":
        return instr.parts[1] in ("test_wait", "try_wait", "pending_count") or (
            instr.parts[1].startswith("arrive") and len(instr.operands) > 0
            and not isinstance(instr.operands[0], Mem)
        )  # fmt: skip
    return bool(instr.operands)


def _is_barrier(instr: Instr) -> bool:
    return instr.op in ("bar", "barrier") and instr.parts[1] != "warp"


def _is_wait(instr: Instr) -> bool:
    return instr.op == "mbarrier" and instr.parts[1] == "try_wait"


def sync_mask(instr: Instr) -> object:
    """Member mask operand of a warp-synchronous instruction, None for "all", False if it is not."""
    if instr.op in _SYNC and "sync" in instr.parts:
        where = _SYNC[instr.op]
        operand = None if where is None else instr.operands[where]
    elif instr.op in ("bar", "barrier") and instr.parts[1] == "warp":
        operand = instr.operands[0]
    else:
        return False
    if isinstance(operand, Imm) and operand.value & 0xFFFFFFFF == 0xFFFFFFFF:
        return None
    return operand


def _span(instr: Instr) -> int:
    return 4 if instr.op == "wgmma" else 1


_SPACES = ("global", "shared", "local", "param", "const")


def memory_op(instr: Instr, klass: str, type_at: int = -1) -> Op:
    """Reads the qualifiers of ld, st, atom and red."""
    parts = instr.parts
    space = next(
        (s for p in parts[1:] for s in _SPACES if p == s or p.startswith(s + "_")), "generic"
    )
    size = type_size(parts[type_at])
    count = next((int(p[1]) for p in parts if p in ("v2", "v4", "v8")), 1)
    strong = bool({"volatile", "relaxed", "acquire", "release", "acq_rel", "mmio"} & set(parts))
    return Op(
        instr,
        space,
        size,
        count,
        klass,
        strong,
        acquire=bool({"acquire", "acq_rel", "volatile", "relaxed"} & set(parts)),
        release=bool({"release", "acq_rel"} & set(parts)),
        noncoherent="nc" in parts,
    )


class _Compiler:
    """Writes the Python source of one block."""

    def __init__(self, program: Program, block: Block) -> None:
        self.p, self.block = program, block
        self.lines: list[str] = []
        self.loaded: set[int] = set()
        self.guard: tuple[int, bool] | None = None
        self.temps = 0
        self.written: set[int] = set()

    def run(self) -> None:
        block = self.block
        result = "None"
        for instr in block.instrs:
            self.guard = instr.guard
            last = instr is block.instrs[-1]
            self.watch(instr)
            try:
                if last and block.term in ("jump", "branch", "brx", "exit", "bar", "wait"):
                    result = self.terminator(instr)
                else:
                    self.instr(instr)
            except (KeyError, StopIteration, IndexError, AttributeError, ValueError) as error:
                self.unknown(instr, repr(error))
        block.saves &= sum(1 << r for r in self.written)
        loads = [f"r{r} = R[{r}]" for r in sorted(self.loaded)]
        saves = [f"R[{r}] = r{r}" for r in bits(block.saves)]
        source = "\n ".join(["def block(S, R):", *loads, *self.lines, *saves, f"return {result}"])
        scope = self.p.env
        code = compile(source, f"<{self.p.kernel.name} block {block.rank}>", "exec")
        exec(code, scope)
        block.fn = scope.pop("block")

    def watch(self, instr: Instr) -> None:
        """Registers of wgmma that other instructions touch."""
        if self.p.wgmma_regs and instr.op != "wgmma":
            reads, writes = self.p.reads_writes(instr)
            regs = sorted(self.p.wgmma_regs.intersection(reads + writes))
            if regs:
                self.lines.append(f"S.wgmma_touch({self.op(Op(instr))}, {regs}, {self.mask()})")

    def unknown(self, instr: Instr, why: str = "") -> None:
        op = self.op(Op(instr, klass="unknown"))
        self.lines.append(f"S.unknown({op}, {why!r})")
        for r in self.p.reads_writes(instr)[1]:
            self.lines.append(f"r{r} = {self.p.constant(0, self.p.home[r])}")
            self.written.add(r)

    # --- operands --------------------------------------------------------------------------

    def reg(self, r: int) -> str:
        if r not in self.written:
            self.loaded.add(r)
        return f"r{r}"

    def get(self, o: object, k: str) -> str:
        """An expression for operand `o` as kind `k`."""
        if isinstance(o, Reg):
            home = self.p.home[o.index]
            name = self.reg(o.index)
            if home == k:
                return name
            if k == "b1" or home == "b1":
                raise ValueError("predicate and value mixed")
            if home[1] == k[1]:
                return f"{name}.view('{k}')"
            return f"{name}.astype('{k}')"
        if isinstance(o, Not):
            return f"~{self.get(o.operand, 'b1')}"
        if isinstance(o, Imm):
            return self.p.constant(_imm_bits(o, k), k)
        if isinstance(o, Sym):
            return self.p.constant(self.address(o), k)
        raise ValueError(f"operand {o}")

    def address(self, o: Sym) -> int:
        program = self.p
        if o.name in program.shared:
            return SHARED_BASE + program.shared[o.name] + o.offset
        if o.name in program.locals:
            return program.locals[o.name] + o.offset
        for param in program.kernel.params:
            if param.name == o.name:
                return param.offset + o.offset
        variable = program.kernel.module.variables.get(o.name)
        if variable is None:
            raise ValueError(f"symbol {o.name}")
        if variable.space == "shared":  # extern: dynamic shared memory follows the static part
            start = -(-program.static_smem // max(variable.align, 16)) * max(variable.align, 16)
            return SHARED_BASE + start + o.offset
        from .engine import symbol_address

        return symbol_address(program.kernel.module, o.name) + o.offset

    def put(self, o: object, expr: str, k: str) -> None:
        """Assigns an expression of kind `k` to a destination, under the current guard."""
        if isinstance(o, Sink):
            return
        r = o.index
        home = self.p.home[r]
        if home != k:
            if home[1] == k[1]:
                expr = f"{expr}.view('{home}')"
            elif int(home[1]) > int(k[1]) and k[0] == "i":
                expr = f"{expr}.astype('i{home[1]}').view('{home}')"
            else:
                expr = f"{expr}.astype('u{home[1]}').view('{home}')"
        if self.guard:
            g, old = self.reg(self.guard[0]), self.reg(r)
            a, b = (old, expr) if self.guard[1] else (expr, old)
            expr = f"where({g}, {a}, {b})"
        self.lines.append(f"r{r} = {expr}")
        self.written.add(r)

    def mask(self) -> str:
        if not self.guard:
            return "None"
        return ("~" if self.guard[1] else "") + self.reg(self.guard[0])

    def op(self, op: Op) -> str:
        self.p.ops.append(op)
        return self.p.name(op, "I")

    def temp(self) -> str:
        self.temps += 1
        return f"t{self.temps}"

    def count(self, klass: str) -> None:
        self.block.classes[klass] = self.block.classes.get(klass, 0) + 1

    def mem(self, m: Mem, k: str = "u8") -> str:
        if isinstance(m.base, (Sym, Imm)):
            base = self.address(m.base) if isinstance(m.base, Sym) else m.base.value
            return self.p.constant(base + m.offset, k)
        expr = self.get(m.base, k)
        return f"({expr} + {self.p.constant(m.offset, k)})" if m.offset else expr

    def call(self, targets: list[tuple[object, str]], call: str) -> None:
        """Emits a helper call whose results go to (operand, kind) targets."""
        if not targets:
            self.lines.append(call)
            return
        temps = [self.temp() for _ in targets]
        self.lines.append(f"{', '.join(temps)}{',' if len(temps) == 1 else ''} = {call}")
        for t, (o, k) in zip(temps, targets):
            self.put(o, t, k)

    # --- instructions ----------------------------------------------------------------------

    def instr(self, instr: Instr) -> None:
        emit = getattr(self, f"emit_{instr.op}", None)
        if instr.op in _IGNORED:
            self.count("other")
        elif emit:
            emit(instr)
        else:
            self.alu(instr)

    def alu(self, instr: Instr) -> None:
        sem = alu.semantics(instr)
        if sem is None:
            self.unknown(instr)
            return
        self.count(sem.klass)
        sources = instr.operands[1:]
        args = [self.get(o, k) for o, k in zip(sources, sem.ins)]
        if len(sem.ins) > len(sources):
            args.append(self.reg(self.p.carry))
        call = f"{self.p.name(sem.fn, 'f')}({', '.join(args)})"
        dest = instr.operands[0]
        if isinstance(sem.out, str):
            self.put(dest, call, sem.out)
            return
        second = Reg(self.p.carry) if "cc" in instr.parts else None
        first, second = (dest, second) if second else (dest.first, dest.second)
        self.call([(first, sem.out[0]), (second, sem.out[1])], call)

    def emit_mov(self, instr: Instr) -> None:
        dest, src = instr.operands
        t = instr.parts[-1]
        if isinstance(dest, Vec):
            width = type_size(t) // len(dest.items)
            self.count("mov")
            whole = self.temp()
            self.lines.append(f"{whole} = {self.get(src, f'u{type_size(t)}')}")
            for i, d in enumerate(dest.items):
                shift = self.p.constant(8 * width * i, f"u{type_size(t)}")
                self.put(d, f"({whole} >> {shift}).astype('u{width}')", f"u{width}")
        elif isinstance(src, Vec):
            whole = f"u{type_size(t)}"
            width = type_size(t) // len(src.items)
            self.count("mov")
            parts = []
            for i, s in enumerate(src.items):
                shift = self.p.constant(8 * width * i, whole)
                part = f"{self.get(s, f'u{width}')}.astype('{whole}')"
                parts.append(f"({part} << {shift})" if i else part)
            self.put(dest, " | ".join(parts), whole) if len(parts) == 1 else self.put(
                dest, f"({' | '.join(parts)})", whole
            )
        elif isinstance(src, Reg) and src.index in (
            self.p.specials.get(n)
            for n in (
                "%clock",
                "%clock64",
                "%clock_hi",
                "%globaltimer",
                "%globaltimer_lo",
                "%globaltimer_hi",
            )
        ):
            k = f"u{type_size(t)}"
            self.count("mov")
            self.put(dest, f"S.clock('{k}')", k)
        elif isinstance(src, Sym):
            k = f"u{type_size(t)}"
            self.count("mov")
            value = self.address(src)
            self.put(dest, self.p.constant(value, k), k)
        else:
            self.alu(instr)

    def emit_cvta(self, instr: Instr) -> None:
        self.count("int")
        parts = instr.parts
        space = next(p for p in parts if p.split("_")[0] in _SPACES).split("_")[0]
        window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}.get(
            space, 0
        )
        expr = self.get(instr.operands[1], "u8")
        if window:
            sign = "-" if "to" in parts else "+"
            expr = f"({expr} {sign} {self.p.constant(window, 'u8')})"
        else:
            expr = f"{expr}.copy()"
        self.put(instr.operands[0], expr, "u8")

    def emit_isspacep(self, instr: Instr) -> None:
        self.count("int")
        space = instr.parts[1].split("_")[0]
        low, high = {
            "global": (0, SHARED_WINDOW),
            "const": (1, 1),
            "shared": (SHARED_WINDOW, LOCAL_WINDOW),
            "local": (LOCAL_WINDOW, PARAM_WINDOW),
            "param": (PARAM_WINDOW, 2 * PARAM_WINDOW),
        }[space]
        a = self.get(instr.operands[1], "u8")
        c = self.p.constant
        self.put(instr.operands[0], f"(({a} >= {c(low, 'u8')}) & ({a} < {c(high, 'u8')}))", "b1")

    def _local_param(self, op: Op, m: Mem) -> None:
        """.param of inlined calls lives in local memory; a kernel's own is its argument buffer."""
        if op.space == "param" and isinstance(m.base, Sym) and m.base.name in self.p.locals:
            op.space = "local"

    def emit_ld(self, instr: Instr) -> None:
        op = memory_op(instr, "load")
        dest, m = instr.operands[0], instr.operands[1]
        self._local_param(op, m)
        t = instr.parts[-1]
        k = ("i" if t[0] == "s" else "u") + str(op.size)
        dests = dest.items if isinstance(dest, Vec) else (dest,)
        self.count(f"load.{op.space}")
        if op.space == "param" and isinstance(m.base, Sym):
            offset = self.address(m.base) + m.offset
            for i, d in enumerate(dests):
                at = offset + i * op.size
                self.put(d, f"S.args[{at}:{at + op.size}].view('{k}')", k)
            return
        call = f"S.load({self.op(op)}, {self.mem(m)}, {self.mask()})"
        temps = [self.temp() for _ in dests]
        self.lines.append(f"{', '.join(temps)}, = {call}")
        for tmp, d in zip(temps, dests):
            self.put(d, f"{tmp}.view('{k}')" if k[0] == "i" else tmp, k)

    emit_ldu = emit_ld

    def emit_st(self, instr: Instr) -> None:
        op = memory_op(instr, "store")
        m, src = instr.operands[0], instr.operands[1]
        self._local_param(op, m)
        items = src.items if isinstance(src, Vec) else (src,)
        values = ", ".join(self.get(s, f"u{op.size}") for s in items)
        self.count(f"store.{op.space}")
        self.lines.append(f"S.store({self.op(op)}, {self.mem(m)}, {self.mask()}, ({values},))")

    def _atomic(self, instr: Instr, dest: object) -> None:
        op = memory_op(instr, "atomic")
        ops = list(instr.operands[1:] if dest is not None else instr.operands)
        action = next(
            p for p in instr.parts[1:]
            if p in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
        )  # fmt: skip
        op.extra = (action, instr.parts[-1])
        self.count(f"atomic.{op.space}")
        m, values = ops[0], ops[1:3] if action == "cas" else ops[1:2]
        k = f"u{op.size}"
        if isinstance(values[0], Vec):
            items = [[self.get(v, k)] for v in values[0].items]
        else:
            items = [[self.get(v, k) for v in values]]
        tuples = ", ".join(f"({', '.join(i)},)" for i in items)
        want = dest is not None and not isinstance(dest, Sink)
        call = f"S.atomic({self.op(op)}, {self.mem(m)}, {self.mask()}, ({tuples},), {want})"
        if want:
            dests = dest.items if isinstance(dest, Vec) else (dest,)
            self.call([(d, k) for d in dests], call)
        else:
            self.lines.append(call)

    def emit_atom(self, instr: Instr) -> None:
        self._atomic(instr, instr.operands[0])

    def emit_red(self, instr: Instr) -> None:
        self._atomic(instr, None)

    def emit_fence(self, instr: Instr) -> None:
        self.count("fence")
        parts = set(instr.parts)
        if not {"cta", "proxy", "mbarrier_init"} & parts:
            self.lines.append(f"S.fence({self.mask()})")
        elif {"proxy", "async"} <= parts and "global" not in parts:
            self.lines.append(f"S.proxy_fence({self.mask()})")

    def emit_membar(self, instr: Instr) -> None:
        self.emit_fence(instr)

    def emit_createpolicy(self, instr: Instr) -> None:
        self.count("other")
        self.put(instr.operands[0], self.p.constant(0, "u8"), "u8")

    def emit_call(self, instr: Instr) -> None:
        ops = list(instr.operands)
        results = ops.pop(0).items if isinstance(ops[0], Args) else ()
        name = ops.pop(0).name
        args = ops[0].items if ops and isinstance(ops[0], Args) else ()
        self.count("call")
        offsets = [self.p.locals[a.name] for a in args]
        result = self.p.locals[results[0].name] if results else None
        if name in ("vprintf", "__assertfail"):
            self.lines.append(
                f"S.builtin({self.op(Op(instr))}, {name!r}, {offsets}, {result}, {self.mask()})"
            )
        else:
            self.unknown(instr)

    def emit_cp(self, instr: Instr) -> None:
        parts = instr.parts
        if parts[1] != "async" or "bulk" in parts:
            self.unknown(instr)
            return
        if "commit_group" in parts:
            self.count("async")
            self.lines.append(f"S.cp_commit({self.mask()})")
        elif "wait_group" in parts or "wait_all" in parts:
            self.count("async")
            keep = instr.operands[0].value if instr.operands else -1
            self.lines.append(f"S.cp_wait({keep}, {self.mask()})")
        elif "mbarrier" in parts:
            self.count("mbarrier")
            op = self.op(Op(instr, "shared", 8, klass="mbarrier"))
            addr = self.mem(instr.operands[0])
            self.lines.append(
                f"S.cp_mbarrier_arrive({op}, {addr}, {self.mask()}, {'noinc' in parts})"
            )
        else:
            self.count("async")
            size = instr.operands[2].value
            op = self.op(Op(instr, "shared", size, klass="async"))
            rest = instr.operands[3:]
            if "L2_cache_hint" in parts:
                rest = rest[:-1]
            source_size = "None"
            if rest:
                o = rest[0]
                if isinstance(o, (Not, Reg)) and self.p.regs[_registers(o)[0]] == "pred":
                    # The ignore-src form: a true predicate writes zeros.
                    ignore = self.get(o, "b1")
                    source_size = f"where({ignore}, np.uint32(0), np.uint32({size}))"
                else:
                    source_size = self.get(o, "u4")
            self.lines.append(
                f"S.cp_async({op}, {self.mem(instr.operands[0])}, {self.mem(instr.operands[1])},"
                f" {source_size}, {self.mask()})"
            )

    def emit_mbarrier(self, instr: Instr) -> None:
        parts, ops = instr.parts, list(instr.operands)
        kind = parts[1]
        self.count("mbarrier")
        op = self.op(Op(instr, "shared", 8, klass="mbarrier"))
        dest = ops.pop(0) if _has_dest(instr) else None
        if kind == "pending_count":
            self.call([(dest, "u4")], f"S.mbar_pending({self.get(ops[0], 'u8')})")
            return
        addr = self.mem(ops.pop(0))
        rest = [self.get(o, "u8" if kind.startswith("test") else "u4") for o in ops]
        if kind == "test_wait":
            parity = "parity" in parts
            arg = self.get(ops[0], "u4" if parity else "u8")
            self.call([(dest, "b1")], f"S.mbar_test({op}, {addr}, {arg}, {parity}, {self.mask()})")
            return
        name = "arrive" if kind.startswith("arrive") else kind
        count, tx = "None", "None"
        if kind == "init":
            count = rest[0]
        elif name == "arrive":
            if "expect_tx" in parts:
                tx = rest[0]
            elif rest:
                count = rest[0]
        elif kind in ("expect_tx", "complete_tx"):
            tx = rest[0]
        drop = "arrive_drop" in parts[1]
        call = f"S.mbar_update({op}, '{name}', {addr}, {count}, {tx}, {drop}, {self.mask()})"
        if dest is not None:
            self.call([(dest, "u8")], call)
        else:
            self.lines.append(call)

    # Warp-level instructions.

    def emit_bar(self, instr: Instr) -> None:  # bar.warp.sync; the rest are terminators
        self.count("barrier")
        self.lines.append("S.warp_sync()")

    emit_barrier = emit_bar

    def emit_shfl(self, instr: Instr) -> None:
        self.count("shuffle")
        dest, a, b, c = instr.operands[:4]
        first, second = (dest.first, dest.second) if isinstance(dest, Pair) else (dest, Sink())
        mode = next(p for p in instr.parts if p in ("up", "down", "bfly", "idx"))
        args = ", ".join([self.get(a, "u4"), self.get(b, "u4"), self.get(c, "u4")])
        self.call([(first, "u4"), (second, "b1")], f"S.shfl('{mode}', {args}, {self.mask()})")

    def emit_vote(self, instr: Instr) -> None:
        self.count("vote")
        mode = instr.parts[2] if instr.parts[1] == "sync" else instr.parts[1]
        k = "u4" if mode == "ballot" else "b1"
        member = self.get(instr.operands[2], "u4") if "sync" in instr.parts else "None"
        src = self.get(instr.operands[1], "b1")
        self.call([(instr.operands[0], k)], f"S.vote('{mode}', {src}, {member}, {self.mask()})")

    def emit_match(self, instr: Instr) -> None:
        self.count("vote")
        dest, a, member = instr.operands
        first, second = (dest.first, dest.second) if isinstance(dest, Pair) else (dest, Sink())
        args = f"{self.get(a, f'u{type_size(instr.parts[-1])}')}, {self.get(member, 'u4')}"
        mode = "all" if "all" in instr.parts else "any"
        self.call([(first, "u4"), (second, "b1")], f"S.match('{mode}', {args}, {self.mask()})")

    def emit_redux(self, instr: Instr) -> None:
        self.count("vote")
        t = instr.parts[-1]
        k = alu.kind(t)
        action = instr.parts[2]
        nan = "NaN" in instr.parts
        absolute = "abs" in instr.parts
        args = f"{self.get(instr.operands[1], k)}, {self.get(instr.operands[2], 'u4')}"
        self.call(
            [(instr.operands[0], k)],
            f"S.redux('{action}', {args}, {nan}, {absolute}, {self.mask()})",
        )

    def emit_activemask(self, instr: Instr) -> None:
        self.count("vote")
        self.call([(instr.operands[0], "u4")], f"S.activemask({self.mask()})")

    def emit_elect(self, instr: Instr) -> None:
        self.count("vote")
        dest = instr.operands[0]
        first, second = (dest.first, dest.second) if isinstance(dest, Pair) else (dest, Sink())
        member = self.get(instr.operands[1], "u4")
        self.call([(first, "u4"), (second, "b1")], f"S.elect({member}, {self.mask()})")

    def emit_ldmatrix(self, instr: Instr) -> None:
        parts = instr.parts
        if "b16" not in parts or "m8n8" not in parts:
            self.unknown(instr)
            return
        dest, m = instr.operands
        dests = dest.items if isinstance(dest, Vec) else (dest,)
        self.count("ldmatrix")
        op = self.op(Op(instr, "shared", 16, klass="load"))
        call = f"S.ldmatrix({op}, {self.mem(m)}, {len(dests)}, {'trans' in parts})"
        self.call([(d, "u4") for d in dests], call)

    def emit_stmatrix(self, instr: Instr) -> None:
        parts = instr.parts
        if "b16" not in parts or "m8n8" not in parts:
            self.unknown(instr)
            return
        m, src = instr.operands
        items = src.items if isinstance(src, Vec) else (src,)
        self.count("stmatrix")
        op = self.op(Op(instr, "shared", 16, klass="store"))
        values = ", ".join(self.get(s, "u4") for s in items)
        self.lines.append(f"S.stmatrix({op}, {self.mem(m)}, ({values},), {'trans' in parts})")

    def emit_movmatrix(self, instr: Instr) -> None:
        self.count("shuffle")
        self.call([(instr.operands[0], "u4")], f"S.movmatrix({self.get(instr.operands[1], 'u4')})")

    def emit_mma(self, instr: Instr) -> None:
        from .matrix import mma_plan

        plan = mma_plan(instr)
        if plan is None:
            self.unknown(instr)
            return
        self.count("mma")
        d, a, b, c = (o.items if isinstance(o, Vec) else (o,) for o in instr.operands[:4])
        groups = ", ".join(
            "(" + ", ".join(self.get(o, "u4") for o in group) + ",)" for group in (a, b, c)
        )
        self.call([(o, "u4") for o in d], f"S.mma({self.p.name(plan, 'M')}, {groups})")

    def emit_wgmma(self, instr: Instr) -> None:
        from .matrix import wgmma_plan

        if instr.guard:
            self.unknown(instr, "under a predicate")
            return
        op = self.op(Op(instr, klass="wgmma"))
        kind = instr.parts[1]
        if kind != "mma_async":
            keep = f", {instr.operands[0].value}" if kind == "wait_group" else ""
            self.count("async")
            self.lines.append(f"S.wgmma_{kind.removesuffix('_group')}({op}{keep})")
            return
        plan = wgmma_plan(instr)
        if plan is None:
            self.unknown(instr)
            return
        self.count("mma")
        d, a, b, scale = instr.operands[:4]
        words = "(" + ", ".join(self.get(o, "u4") for o in d.items) + ",)"
        if isinstance(a, Vec):
            left = "(" + ", ".join(self.get(o, "u4") for o in a.items) + ",)"
        else:
            left = self.get(a, "u8")
        self.call(
            [(o, "u4") for o in d.items],
            f"S.wgmma({op}, {self.p.name(plan, 'M')}, {words}, {left}, {self.get(b, 'u8')}, "
            f"{self.get(scale, 'b1')})",
        )

    # --- terminators -----------------------------------------------------------------------

    def terminator(self, instr: Instr) -> str:
        term = self.block.term
        if term == "jump":
            self.count("branch")
            return "None"
        if term == "branch":
            self.count("branch")
            return self.reg(instr.guard[0])
        if term == "brx":
            self.count("branch")
            return self.get(instr.operands[0], "u4")
        if term == "exit":
            self.count("branch")
            if instr.op == "trap":
                self.lines.append(f"S.trap({self.op(Op(instr))}, {self.mask()})")
            return self.mask()
        if term == "wait":
            self.count("mbarrier")
            op = self.op(Op(instr, "shared", 8, klass="mbarrier"))
            parity = "parity" in instr.parts
            arg = self.get(instr.operands[2], "u4" if parity else "u8")
            dest = instr.operands[0]
            done, addr = self.temp(), self.temp()
            self.lines.append(f"{addr} = {self.mem(instr.operands[1])}")
            self.lines.append(
                f"{done} = S.mbar_test({op}, {addr}, {arg}, {parity}, {self.mask()})[0]"
            )
            self.put(dest, done, "b1")
            return f"({op}, {addr}, {done}, {self.mask()})"
        # Barriers.
        self.count("barrier")
        parts = instr.parts[2:] if instr.parts[1] == "cta" else instr.parts[1:]
        ops = list(instr.operands)
        action = next(p for p in parts if p in ("sync", "arrive", "red"))
        dest = ops.pop(0) if action == "red" else None
        predicate = self.get(ops.pop(), "b1") if action == "red" else "None"
        reduce = next((p for p in parts if p in ("popc", "and", "or")), None)
        which = self.get(ops[0], "u4")
        count = self.get(ops[1], "u4") if len(ops) > 1 else "None"
        aligned = instr.op == "bar" or "aligned" in parts
        op = Op(
            instr, klass="barrier", extra=(action, reduce, dest.index if dest else None, aligned)
        )
        return f"({self.op(op)}, {which}, {count}, {predicate}, {self.mask()})"


def _imm_bits(o: Imm, k: str) -> int:
    """The bit pattern of an immediate as kind `k`."""
    if o.kind == "i":
        if k in ("f4", "f8"):
            return int(np.array([float(o.value)], k).view(f"u{k[1]}")[0])
        return o.value
    if o.kind == "f":
        if k in ("f8", "u8"):
            return int(np.array([o.value], "u4").view("f4").astype("f8").view("u8")[0])
        return o.value
    if k in ("f4", "u4", "i4"):
        return int(np.array([o.value], "u8").view("f8").astype("f4").view("u4")[0])
    return o.value
