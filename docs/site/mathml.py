"""Equations as MathML, which browsers draw by themselves: no script, no fonts, no network."""

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.util import logging

logger = logging.getLogger(__name__)


def to_mathml(latex, node, display):
    # Other names for what the converter does not know, or sets in italics.
    known = latex.replace("{aligned}", "{split}").replace(r"\mathrm{", r"\text{")
    try:
        mathml = convert(known, display="block" if display else "inline")
    except Exception as error:
        logger.warning("cannot convert %r: %s", latex, error, location=node)
        return latex
    if "\\" in mathml or ">&<" in mathml:
        logger.warning("left as LaTeX in %r", latex, location=node)
    return mathml


def visit_math(self, node):
    self.body.append(to_mathml(node.astext(), node, display=False))
    raise SkipNode


def visit_displaymath(self, node):
    equation = to_mathml(node.astext(), node, display=True)
    self.body.append(f'<div class="equation">{equation}</div>\n')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
