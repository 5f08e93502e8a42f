"Sphinx extension: formulas as MathML, which browsers draw themselves; no script, no fonts from elsewhere."
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

def inline(self, node: nodes.math):
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode

def block(self, node: nodes.math_block):
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode

def setup(app: Sphinx) -> dict:
    app.add_html_math_renderer('mathml', inline_renderers=(inline, None), block_renderers=(block, None))
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
