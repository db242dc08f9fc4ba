"""From a template's source to code with a toll at every loop and a call for every operation that has a price."""

from __future__ import annotations

from typing import Any

import jinja2.ext
from jinja2 import Environment, TemplateAssertionError, nodes
from jinja2.parser import Parser
from jinja2.visitor import NodeTransformer

_STATEMENTS = (
    *(nodes.Assign, nodes.AssignBlock, nodes.Break, nodes.CallBlock, nodes.Continue, nodes.FilterBlock, nodes.For),
    *(nodes.If, nodes.Macro, nodes.Output, nodes.Template, nodes.TemplateData, nodes.With),
)
_EXPRESSIONS = (
    *(nodes.Call, nodes.Compare, nodes.Concat, nodes.CondExpr, nodes.Filter, nodes.Getattr, nodes.Getitem, nodes.Test),
    *(nodes.Const, nodes.Dict, nodes.List, nodes.Tuple, nodes.Name, nodes.NSRef, nodes.EnvironmentAttribute),
    *(nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow, nodes.Neg, nodes.Pos),
    *(nodes.And, nodes.Or, nodes.Not, nodes.Keyword, nodes.Operand, nodes.Pair, nodes.Slice),
)
SYNTAX = frozenset({*_STATEMENTS, *_EXPRESSIONS})
_DEAR = (nodes.BinExpr, nodes.Call, nodes.Compare, nodes.Concat, nodes.Filter, nodes.Getattr, nodes.Getitem, nodes.Test)
_DEAR_STEPS = 10
_MAX_SOURCE = 100_000  # published templates have up to 20,000 characters
_MAX_NODES = 10_000  # and up to 1,400 nodes


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's text for training; a rendering shows what is inside."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way

    def parse(self, parser: Parser) -> nodes.Node:
        """Read up to `{% endgeneration %}`. The body keeps its assignments to itself, as a macro's does."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(_call("generation", line), [], [], body, lineno=line)


def parse(environment: Environment, source: str) -> nodes.Template:
    """Parse and rewrite a template.

    Args:
        environment: whose attributes the rewritten template calls: `toll`, `tilde`, `compare`, `cut`, `key`, `listed`,
            `mapping` and `generation`. No name in a template's own source leads to them.
        source: the template.

    Raises:
        TemplateSyntaxError: the source is no template, uses syntax that is not on the list, or is too long.
    """
    if len(source) > _MAX_SOURCE:
        raise TemplateAssertionError("the template is too long", 1)
    tree = _Rewriter().visit(environment.parse(source))
    assert isinstance(tree, nodes.Template)  # noqa: S101 - for the type checker
    return tree


def _call(name: str, line: int, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None, lineno=line)


class _Rewriter(NodeTransformer):
    def __init__(self) -> None:
        self._nodes = 0
        self._steps = 0
        self._text = 0

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        self._nodes += 1
        if type(node) not in SYNTAX:
            raise TemplateAssertionError(f"{type(node).__name__} is not supported in a chat template", node.lineno)
        if self._nodes > _MAX_NODES:
            raise TemplateAssertionError("the template is too long", node.lineno)
        self._steps += _DEAR_STEPS if isinstance(node, _DEAR) else 1
        if isinstance(node, nodes.TemplateData):
            self._text += len(node.data)
        return super().generic_visit(node, *args, **kwargs)

    def _visit_repeated(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        steps, text = self._steps, self._text
        self.generic_visit(node)
        price = nodes.Const(self._steps - steps + _DEAR_STEPS), nodes.Const(4 * (self._text - text))
        node.body.insert(0, nodes.ExprStmt(_call("toll", node.lineno, *price), lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(_call("toll", node.lineno, *price), node.test, lineno=node.lineno)
        return node

    visit_For = visit_Macro = visit_CallBlock = _visit_repeated  # noqa: N815 - these are the names Jinja looks for

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("tilde", node.lineno, *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        # One call for the whole chain: unlike Python, `a < b < c` looks at `c` even where `a < b` fails.
        chain = [part for operand in node.ops for part in (nodes.Const(operand.op), operand.expr)]
        return _call("compare", node.lineno, node.expr, *chain)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = [bound or nodes.Const(None) for bound in (node.arg.start, node.arg.stop, node.arg.step)]
        return _call("cut", node.lineno, node.node, *bounds)

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _call("key", node.lineno, node.key)
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = _call("listed", node.lineno, node.dyn_args)
        if node.dyn_kwargs is not None:
            node.dyn_kwargs = _call("mapping", node.lineno, node.dyn_kwargs)
        return node

    def _visit_named(self, node: nodes.Filter | nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise TemplateAssertionError("* and ** are not supported in filters and tests", node.lineno)
        return node

    visit_Filter = visit_Test = _visit_named  # noqa: N815
