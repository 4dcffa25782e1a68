"""What a listener touches besides its item, found from its source: state, streams, models.

A listener is a plain function that closes over its agent. What it reads and writes there decides whether it
may run beside others, whether its questions may be asked ahead of their turn, and what a restart has to bring
back. Where the source does not tell, the worst is taken to be true.
"""

from __future__ import annotations

import ast
import inspect
import linecache
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from chainwax.flows.chainstream import memory
from chainwax.flows.chainstream._batches import ByFunction, Collecting
from chainwax.flows.chainstream._world import Listener
from chainwax.flows.chainstream.agent import Agent
from chainwax.flows.chainstream.llm import Model
from chainwax.flows.chainstream.stream import Stream, create_stream, get_stream

__all__ = ["Place", "Question", "Touches", "is_leaf", "touches"]

_LEAVES = (str, bytes, int, float, complex, bool, type(None), range, type, ModuleType)
_READS = frozenset(
    """get keys values items copy index count get_all read snapshot find_item get_keys lower upper strip split
    format join startswith endswith encode decode isdisjoint issubset issuperset union intersection difference
    debug info warning error exception critical log search match findall sub fullmatch""".split()  # noqa: SIM905
)
"""Methods that leave their object as it is."""
_HARMLESS = frozenset(
    """len str repr sum sorted min max any all list dict set tuple frozenset enumerate zip range isinstance
    print bool int float abs round reversed hash type make_prompt dumps deepcopy copy join""".split()  # noqa: SIM905
)
"""Functions that leave what they are given as it is."""


_KNOWN_CALLS = frozenset(
    "get_stream create_stream log_to_console notify_user for_each add_item send_item send".split()  # noqa: SIM905
)
"""Of the API: they are given an agent for its name alone."""


class Place:
    """Where state lies: an attribute of an agent, a variable around a function, a name of a module."""

    __slots__ = ("kind", "label", "name", "owner")

    def __init__(self, kind: str, owner: Any, name: str, label: str) -> None:
        self.kind = kind
        """``attribute``, ``variable``, ``global``, ``batch`` or ``memory``."""
        self.owner = owner
        """The agent, the cell, the module's names or the collection."""
        self.name = name
        self.label = label
        """For people, and for a saved state: the same in each process."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __repr__(self) -> str:
        return f"Place({self.kind} {self.label})"

    @property
    def _identity(self) -> tuple[str, int, str]:
        # A variable is its cell, whatever the functions around it call it.
        return (self.kind, id(self.owner), "" if self.kind == "variable" else self.name)


class Question(NamedTuple):
    """A place in the source that asks a model."""

    code: CodeType
    line: int
    column: int
    end_line: int
    kind: str
    """The model's, where it is known; else ``text``."""


@dataclass(slots=True)
class Touches:
    """What a listener touches."""

    reads: dict[Place, Any] = field(default_factory=dict)
    """Places with the value that is there when the agents have started."""
    writes: set[Place] = field(default_factory=set)
    """Those that the listener changes, or may."""
    streams: set[str] = field(default_factory=set)
    """Streams that it may add items to, besides that of its return value."""
    anywhere: bool = False
    """Whether it may add items to any stream."""
    changes_item: bool = False
    """Whether it changes the item that it is given."""
    questions: list[Question] = field(default_factory=list)
    """Where it asks models, in the order of the source."""


def touches(listener: Listener) -> Touches:
    """What a listener touches."""
    found = Touches()
    fn: Any = listener.fn
    if isinstance(fn, Collecting):
        place = Place("batch", fn, "state", f"{listener.id}.items")
        found.reads[place] = None
        found.writes.add(place)
        if not isinstance(fn, ByFunction):
            return found
        fn = fn.fn
    _Reader(found, listener).function(fn)
    return found


class _Reader:
    """Reads a listener's source and that of all the functions of its own that it calls."""

    def __init__(self, found: Touches, listener: Listener) -> None:
        self._found = found
        self._listener = listener
        self._seen: set[tuple[CodeType, int]] = set()
        self._walked: dict[int, Any] = {}

    def function(self, fn: Any) -> None:
        """Read a function; a library's is taken to be harmless."""
        own = None
        if isinstance(fn, MethodType):
            own, fn = fn.__self__, fn.__func__
        if isinstance(fn, partial):
            self._held([*fn.args, *fn.keywords.values()])
            self.function(fn.func)
            return
        if hasattr(fn, "__wrapped__"):
            self.function(fn.__wrapped__)
        if not isinstance(fn, FunctionType):
            if not callable(fn) or isinstance(fn, type) or fn.__class__.__module__ == "builtins":
                return
            if type(fn).__module__ == self._listener.agent.__class__.__module__:
                self.worst(fn)  # an object of the agents' own that can be called
            return
        if (fn.__code__, id(own)) in self._seen or not _is_own(fn, self._listener):
            return
        self._seen.add((fn.__code__, id(own)))
        self._held([*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()])
        node = _source_of(fn.__code__)
        if node is None:
            self.worst(fn)
            return
        _Function(self, self._found, fn, node, own).read()

    def worst(self, fn: Any) -> None:
        """Nothing can be known of a function: it may change all that it can reach."""
        self._found.changes_item = True
        for name, cell in _cells(fn).items():
            self.value(Place("variable", cell, name, f"{self._listener.id}.{name}"), _content(cell), True)
        self.agent(self._listener.agent)

    def agent(self, agent: Agent) -> None:
        """All of an agent may be changed."""
        for name, value in vars(agent).items():
            if name not in ("agent_id", "priority", "logger"):
                self.value(Place("attribute", agent, name, f"{agent.agent_id}.{name}"), value, True)

    def value(self, place: Place, value: Any, changes: bool) -> None:
        """A value was met."""
        if isinstance(value, Stream):
            self._found.streams.add(value.stream_id)
        elif isinstance(value, Agent):
            if changes:
                self.agent(value)
        elif isinstance(value, FunctionType | MethodType):
            self.function(value)
        elif not isinstance(value, Model) and value is not memory:
            self._found.reads.setdefault(place, value)
            if changes and not is_leaf(value):
                self._found.writes.add(place)
            self._held(value)

    def _held(self, value: Any) -> None:
        """What can be reached through a value: streams in a dict, functions in a list, an object's own."""
        todo = [value]
        while todo:
            one = todo.pop()
            if is_leaf(one) or id(one) in self._walked:
                continue
            self._walked[id(one)] = one
            if isinstance(one, Stream):
                self._found.streams.add(one.stream_id)
            elif isinstance(one, Agent):
                self.agent(one)
            elif isinstance(one, FunctionType | MethodType):
                self.function(one)
            elif isinstance(one, Mapping):
                todo += [*one.keys(), *one.values()]
            elif isinstance(one, list | tuple | set | frozenset | deque):
                todo += one
            elif type(one).__module__ == type(self._listener.agent).__module__:
                # An object of the agents' own: its methods are their code too.
                todo += vars(one).values() if hasattr(one, "__dict__") else ()
                todo += [
                    fn
                    for cls in type(one).__mro__
                    for fn in vars(cls).values()
                    if isinstance(fn, FunctionType)
                ]


class _Function(ast.NodeVisitor):
    """Reads one function."""

    def __init__(
        self, reader: _Reader, found: Touches, fn: FunctionType, node: ast.AST, own: object = None
    ) -> None:
        self._reader = reader
        self._found = found
        self._fn = fn
        self._node = node
        self._cells = _cells(fn)
        self._locals = set(fn.__code__.co_varnames) | set(fn.__code__.co_cellvars)
        self._own = own
        """What the function is a method of, and the name that it calls it by."""
        self._own_name = fn.__code__.co_varnames[0] if own is not None and fn.__code__.co_argcount else ""
        self._fresh = _fresh_names(node)
        self._parents: dict[ast.AST, ast.AST] = {}

    def read(self) -> None:
        for parent in ast.walk(self._node):
            for child in ast.iter_child_nodes(parent):
                self._parents[child] = parent
        body = self._node.body  # type: ignore[attr-defined]
        for statement in body if isinstance(body, list) else [body]:
            self.visit(statement)

    # -- what is met ----------------------------------------------------------------------------

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) or node.id not in self._locals or node.id in self._cells:
            self._chain(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._chain(node)

    def visit_Nonlocal(self, node: ast.Nonlocal) -> None:
        for name in node.names:
            cell = self._cells.get(name)
            if cell is not None:
                self._write(self._variable(name, cell), _content(cell))

    def visit_Global(self, node: ast.Global) -> None:
        for name in node.names:
            self._write(self._global(name), self._fn.__globals__.get(name))

    def _chain(self, node: ast.expr) -> None:
        """A name with what follows its dots: how far it can be followed, and what is done with the end."""
        parts: list[tuple[str, ast.expr]] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            parts.append((inner.attr, inner))
            inner = inner.value
        if not isinstance(inner, ast.Name):
            self.visit(inner)
            if parts and isinstance(node, ast.Attribute) and self._asks(node):
                self._question(node, "text")
            return
        parts.reverse()
        name, here = inner.id, inner
        if name in self._cells:
            place, value = self._variable(name, self._cells[name]), _content(self._cells[name])
        elif name == self._own_name and isinstance(self._own, Agent):
            # Only its attributes are places; what is done with all of it is seen at the end of the chain.
            place, value = Place("variable", None, name, name), self._own
        elif name in self._locals:
            self._of_local(name, node)
            return
        elif name in self._fn.__globals__:
            place, value = self._global(name), self._fn.__globals__[name]
        else:
            return  # a builtin's name
        end: ast.expr = here
        for attr, step in parts:
            if isinstance(value, ModuleType):
                value = getattr(value, attr, None)
                place = Place("global", None, attr, f"{name}.{attr}")
                end = step
            elif isinstance(value, Agent):
                agent = value
                place = Place("attribute", agent, attr, f"{agent.agent_id}.{attr}")
                value = self._attribute(agent, attr)
                end = step
                if isinstance(value, Stream | Model | Agent):
                    continue
                break
            elif isinstance(value, Stream) and attr == "stream":
                end = step
            else:
                break
        self._end(place, value, end)

    def _end(self, place: Place, value: Any, node: ast.expr) -> None:
        """What is done with the value at the end of a chain."""
        context = getattr(node, "ctx", None)
        if isinstance(context, ast.Store | ast.Del):
            self._write(place, value)
            return
        if isinstance(value, Model):
            parent = self._parents.get(node)
            if isinstance(parent, ast.Attribute) and parent.attr == "query":
                self._question(parent, value.kind)
            else:
                self._question(node, value.kind)
            return
        if isinstance(value, Agent):
            if not self._is_known_call(node):
                self._reader.agent(value)
            return
        if value in (get_stream, create_stream):
            self._of_get_stream(node)
            return
        if value in (memory.fetch, memory.create):
            self._of_memory(node)
            return
        if isinstance(value, type) or (value is None and place.kind == "global"):
            return
        if isinstance(value, FunctionType) and not _is_own(value, self._reader._listener):
            return
        self._reader.value(place, value, self._changes(value, node))

    def _write(self, place: Place, value: Any) -> None:
        self._found.reads.setdefault(place, value)
        self._found.writes.add(place)

    # -- what is done with it -------------------------------------------------------------------

    def _changes(self, value: Any, node: ast.expr) -> bool:
        """Whether a value that can change may be changed by what is done with it here."""
        if is_leaf(value):
            return False
        if isinstance(value, FunctionType | MethodType | Stream):
            return False
        parent = self._parents.get(node)
        flat = _is_flat(value)
        match parent:
            case ast.Attribute(attr=attr):
                called = isinstance(self._parents.get(parent), ast.Call)
                if not (called and attr in _READS):
                    return True
                return not flat and attr not in ("count", "index", "keys", "debug", "info", "warning")
            case ast.Subscript(value=inner, ctx=context) if inner is node:
                return isinstance(context, ast.Store | ast.Del) or not flat
            case ast.Call(func=func) if func is not node:
                name = func.id if isinstance(func, ast.Name) else getattr(func, "attr", "")
                return name not in _HARMLESS or (not flat and name in ("list", "tuple", "sorted", "zip"))
            case ast.For(iter=inner) | ast.comprehension(iter=inner) if inner is node:
                return not flat
            case ast.Compare() | ast.BoolOp() | ast.UnaryOp() | ast.FormattedValue() | ast.If() | ast.While():
                return False
            case ast.BinOp() | ast.IfExp():
                return not flat
        return True

    def _of_local(self, name: str, node: ast.expr) -> None:
        """A name of the function's own, its item among them."""
        if isinstance(node, ast.Attribute):
            parent = self._parents.get(node)
            if node.attr == "query" and isinstance(parent, ast.Call) and name not in self._fresh:
                self._question(node, "text")
            called = isinstance(parent, ast.Call) and parent.func is node
            if name not in self._fresh and not (called and node.attr in _READS):
                self._found.changes_item = True
            return
        parent = self._parents.get(node)
        if isinstance(parent, ast.Subscript) and parent.value is node:
            top: ast.AST = parent
            while isinstance(self._parents.get(top), ast.Subscript) and self._parents[top].value is top:  # type: ignore[attr-defined]
                top = self._parents[top]
            changed = isinstance(top.ctx, ast.Store | ast.Del)  # type: ignore[attr-defined]
            after = self._parents.get(top)
            if isinstance(after, ast.Attribute) and isinstance(self._parents.get(after), ast.Call):
                changed = after.attr not in _READS
            if changed and name not in self._fresh:
                self._found.changes_item = True

    def _asks(self, node: ast.Attribute) -> bool:
        return node.attr == "query" and isinstance(self._parents.get(node), ast.Call)

    def _question(self, node: ast.expr, kind: str) -> None:
        question = Question(
            self._fn.__code__, node.lineno, node.col_offset, node.end_lineno or node.lineno, kind
        )
        if question not in self._found.questions:
            self._found.questions.append(question)

    def _is_known_call(self, node: ast.expr) -> bool:
        """Whether an agent is given to a function of the API, which does not look into it."""
        parent = self._parents.get(node)
        if not isinstance(parent, ast.Call) or parent.func is node:
            return False
        name = parent.func.attr if isinstance(parent.func, ast.Attribute) else getattr(parent.func, "id", "")
        return name in _KNOWN_CALLS

    def _of_get_stream(self, node: ast.expr) -> None:
        name = self._text_given(node, -1)
        if name is None:
            self._found.anywhere = True
        else:
            self._found.streams.add(name)

    def _of_memory(self, node: ast.expr) -> None:
        name = self._text_given(node) or ""
        self._write(Place("memory", None, name, f"memory.{name or 'of any name'}"), memory.known(name))

    def _text_given(self, node: ast.expr, place: int = 0) -> str | None:
        """The text that a call has for an argument, where it stands there as such."""
        call = self._parents.get(node)
        if not isinstance(call, ast.Call) or call.func is not node or not call.args:
            return None
        given = call.args[place]
        return given.value if isinstance(given, ast.Constant) and isinstance(given.value, str) else None

    def _attribute(self, agent: Agent, name: str) -> Any:
        """An attribute's value, without running a property's code."""
        if name in vars(agent):
            return vars(agent)[name]
        static = inspect.getattr_static(type(agent), name, None)
        if isinstance(static, property):
            if static.fget is not None:
                self._reader.function(MethodType(static.fget, agent))
            return None
        if isinstance(static, staticmethod | classmethod):
            return static.__func__
        return MethodType(static, agent) if isinstance(static, FunctionType) else static

    def _variable(self, name: str, cell: Any) -> Place:
        return Place("variable", cell, name, f"{self._reader._listener.id}.{name}")

    def _global(self, name: str) -> Place:
        space = self._fn.__globals__
        # Not the module's own name, which may be another in the next run.
        return Place("global", space, name, f"{self._reader._listener.agent.agent_id}.py: {name}")


def _cells(fn: Any) -> dict[str, Any]:
    if not isinstance(fn, FunctionType) or not fn.__closure__:
        return {}
    return dict(zip(fn.__code__.co_freevars, fn.__closure__, strict=True))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


def _is_own(fn: FunctionType, listener: Listener) -> bool:
    """Whether a function is of the agents' own code, and not a library's."""
    return fn.__globals__ is _globals_of(listener)


def _globals_of(listener: Listener) -> dict[str, Any]:
    fn: Any = listener.fn.fn if isinstance(listener.fn, ByFunction) else listener.fn
    fn = inspect.unwrap(fn) if callable(fn) else fn
    if isinstance(fn, FunctionType):
        return fn.__globals__
    start = getattr(type(listener.agent), "start", None)
    return getattr(start, "__globals__", {})


def is_leaf(value: Any) -> bool:
    """Whether a value can never change."""
    if isinstance(value, tuple | frozenset):
        return all(map(is_leaf, value))
    return isinstance(value, _LEAVES) or getattr(type(value), "__module__", "") in ("re", "logging")


def _is_flat(value: Any) -> bool:
    """Whether what a value holds can never change, whatever becomes of the value itself."""
    if isinstance(value, dict):
        return all(map(_is_fixed, value.values())) and bool(value)
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_fixed, value)) and bool(value)
    return False


def _is_fixed(value: Any) -> bool:
    return is_leaf(value) or isinstance(value, Stream | Model | FunctionType | MethodType)


def _fresh_names(node: ast.AST) -> set[str]:
    """Names that the function only ever gives values to that it has made itself."""
    made: dict[str, bool] = {}
    for part in ast.walk(node):
        if isinstance(part, ast.Assign):
            for target in part.targets:
                for name in _names_in(target):
                    fresh = isinstance(target, ast.Name) and _is_fresh(part.value)
                    made[name] = made.get(name, True) and fresh
        elif isinstance(part, ast.AnnAssign | ast.NamedExpr):
            for name in _names_in(part.target):
                made[name] = made.get(name, True) and part.value is not None and _is_fresh(part.value)
        elif isinstance(part, ast.For | ast.comprehension):
            made.update(dict.fromkeys(_names_in(part.target), False))
        elif isinstance(part, ast.arg):
            made[part.arg] = False
    return {name for name, fresh in made.items() if fresh}


def _names_in(target: ast.AST) -> Iterator[str]:
    return (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def _is_fresh(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        # ``item.get("x")`` and the like give a part of something that was there.
        return not (isinstance(value.func, ast.Attribute) and value.func.attr in ("get", "setdefault", "pop"))
    return isinstance(
        value,
        ast.Dict
        | ast.List
        | ast.Set
        | ast.DictComp
        | ast.ListComp
        | ast.SetComp
        | ast.Constant
        | ast.JoinedStr
        | ast.BinOp
        | ast.Compare
        | ast.Tuple,
    )


def _source_of(code: CodeType) -> ast.AST | None:
    """The function's own part of its file's syntax tree; None where it cannot be told apart."""
    lines = linecache.getlines(code.co_filename)
    try:
        tree = ast.parse("".join(lines))
    except (SyntaxError, ValueError):
        return None
    kinds: Callable[[ast.AST], bool] = lambda node: (  # noqa: E731
        isinstance(node, ast.FunctionDef) and node.name == code.co_name
        if code.co_name != "<lambda>"
        else isinstance(node, ast.Lambda)
    )
    found = [
        node
        for node in ast.walk(tree)
        if kinds(node)
        and min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])  # type: ignore[attr-defined]
        == code.co_firstlineno
    ]
    return found[0] if len(found) == 1 else None
