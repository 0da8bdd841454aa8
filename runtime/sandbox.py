"""Jinja for templates nobody vouches for: no attribute tricks, bounded steps, bounded text.

jinja2's ImmutableSandboxedEnvironment refuses access to internals and changes of its arguments. It
bounds neither work nor memory, so this adds: every loop turn and every call is counted; every text
that is built or put out is measured before (`~`, `+`, `*`, `%`, filters, methods); no argument is a
huge number (`center(10**9)`). Not bounded: the time of one C call on input of bounded size.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, cast

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

LARGEST_TEXT = 8 << 20  # characters of any text a template builds, and of all it puts out
LARGEST_STEPS = 300_000  # loop turns and calls of one rendering, about a second
_LARGEST_NUMBER = 1 << 16  # as an argument
_LARGEST_BITS = 4096
_WIDE_FIELD = re.compile(r"[0-9]{5}")
# Their result is no longer than what they are given (times a small constant).
_LINEAR = frozenset(
    "trim strip lstrip rstrip split rsplit splitlines startswith endswith upper lower title "
    "capitalize length count find rfind index string safe first last list items keys values get "
    "default d int float tojson map select reject selectattr rejectattr sort unique reverse "
    "append raise_exception macro bounded_loop bounded_text bounded_output".split()
)


class GenerationTag(Extension):
    """`{% generation %}`: marks the assistant's part for training; renders as its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The body, as if the tag were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """The environment for one rendering (it counts, so it is made anew each time)."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
        )
        self._steps = 0
        self._characters = 0
        del self.globals["lipsum"]
        filters = cast(dict[str, Callable[..., Any]], self.filters)
        for name, function in list(filters.items()):
            self.add_filter(name, function)
        filters["bounded_loop"] = self._bounded_loop
        filters["bounded_text"] = self._bounded_text
        filters["bounded_output"] = self._bounded_output

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Registers a filter whose every call is counted and measured."""

        @functools.wraps(function)  # keeps jinja's mark of filters that want the context
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self._admit(name, args, kwargs)
            return function(*args, **kwargs)

        cast(dict[str, Callable[..., Any]], self.filters)[name] = guarded

    def add_global(self, name: str, value: object) -> None:
        """Makes `value` known to templates as `name`."""
        cast(dict[str, object], self.globals)[name] = value

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _insert_guards(tree)
        return tree

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Any call a template makes: counted, and measured with the object it is a method of."""
        method = getattr(__obj, "__wrapped__", __obj)  # jinja wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(__obj, LoopContext):  # loop(children) of a recursive loop
            self._spend(len(args[0]) if args and isinstance(args[0], Sized) else LARGEST_STEPS)
        given = (owner, *args) if isinstance(owner, str | bytes) else args
        self._admit(str(getattr(__obj, "__name__", "macro")), given, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic that can build something large from something small."""
        self._spend(1)
        size = _expanded(left) + _expanded(right)
        if operator in ("*", "**"):
            size = _product_size(operator, left, right)
        elif operator == "%" and isinstance(left, str):
            size = 0
            self._admit("format", (left, right), {})
        _limit(size, f"the result of {operator}")
        return super().call_binop(context, operator, left, right)

    def _admit(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Counts one call and refuses it when its result might be too large."""
        self._spend(1)
        given = (*args, *kwargs.values())
        for value in (*given, *_members(name, given)):
            if isinstance(value, int) and abs(value) > _LARGEST_NUMBER and name not in _LINEAR:
                raise SecurityError(f"{name}: the number {value} is too large")
        if name in ("format", "format_map") and _WIDE_FIELD.search(str(args[0])):
            raise SecurityError("a format with a wide field is not allowed")
        _limit(_result_size(name, given), name)

    def _bounded_loop(self, items: Any) -> Any:
        """What a `for` runs over; its turns are counted before it starts, if it has a length."""
        if isinstance(items, Sized):
            self._spend(len(items))
            return items
        return self._counted(cast(Iterable[Any], items))

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._spend(1)
            yield item

    def _bounded_text(self, value: Any) -> Any:
        _limit(_expanded(value), "a text")
        return value

    def _bounded_output(self, value: Any) -> Any:
        """Everything put out: into the result, a macro's result, or a `{% set %}` block."""
        self._characters += _expanded(value)
        _limit(self._characters, "all that the template puts out")
        return value

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > LARGEST_STEPS:
            raise SecurityError(f"the template runs more than {LARGEST_STEPS} steps")


def _members(name: str, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a tuple brings into a format: `'%*d' % (width, 1)`."""
    if name != "format":
        return ()
    tuples = [cast(tuple[Any, ...], value) for value in given if isinstance(value, tuple)]
    return tuple(item for inner in tuples for item in inner)


def _limit(size: int, what: str) -> None:
    if size > LARGEST_TEXT:
        raise SecurityError(f"{what} is larger than {LARGEST_TEXT} characters")


def _insert_guards(tree: nodes.Template) -> None:
    """Puts our filters around what a sandbox cannot intercept: loops, `~`, and all output."""
    for loop in tree.find_all(nodes.For):
        loop.iter = _filtered(loop.iter, "bounded_loop")
    for concat in tree.find_all(nodes.Concat):
        concat.nodes = [_filtered(part, "bounded_text") for part in concat.nodes]
    for output in tree.find_all(nodes.Output):
        output.nodes = [_filtered(_constant(part), "bounded_output") for part in output.nodes]


def _constant(part: nodes.Expr) -> nodes.Expr:
    is_text = isinstance(part, nodes.TemplateData)
    return nodes.Const(part.data, lineno=part.lineno) if is_text else part


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr, node), name, [], [], None, None, lineno=node.lineno)


def _expanded(value: Any, known: dict[int, int] | None = None) -> int:
    """Characters of `str(value)`, roughly; a list that holds itself many times over counts so."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return 1 + value.bit_length() // 3
    if isinstance(value, Namespace):
        value = vars(value)
    if not isinstance(value, list | tuple | dict):
        return 16
    known = {} if known is None else known
    if id(cast(object, value)) not in known:
        known[id(cast(object, value))] = 0  # while it is being measured: a cycle ends here
        items = cast(Iterable[Any], value if not isinstance(value, dict) else value.items())
        known[id(cast(object, value))] = 2 + sum(_expanded(item, known) + 2 for item in items)
    return known[id(cast(object, value))]


def _result_size(name: str, given: tuple[Any, ...]) -> int:
    """An upper bound of the characters a function can make of what it is given."""
    sizes = [_expanded(value) for value in given if not isinstance(value, int)]
    if name in _LINEAR or len(sizes) == 0:
        return sum(sizes)
    texts = [value for value in given if isinstance(value, str)]
    if name == "replace" and len(texts) == 3:
        return sizes[0] + texts[0].count(texts[1]) * len(texts[2])
    if name == "join":
        count = max((len(cast(Sized, v)) for v in given if isinstance(v, list | tuple)), default=0)
        return sum(sizes) + count * sum(len(text) for text in texts)
    product = 1
    for value in given:
        product *= max(1, abs(value) if isinstance(value, int) else _expanded(value))
    return max(sum(sizes), product // 16)  # 16: such functions repeat at most what is text


def _product_size(operator: str, left: Any, right: Any) -> int:
    """Size of a product: elements for text and lists, more than the limit for huge numbers."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * (right if operator == "**" else 1) + right.bit_length()
        return 0 if bits <= _LARGEST_BITS else LARGEST_TEXT + 1
    value, count = (right, left) if isinstance(left, int) else (left, right)
    return _expanded(value) * count if isinstance(count, int) else 0
