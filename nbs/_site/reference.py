"The API reference: one page a module, made of its docstrings, signatures and the comments beside parameters; and links to it from prose."
import ast
import re
import tokenize
from io import StringIO
from pathlib import Path

def modules(package: Path) -> dict[str, list[str]]:
    "Exported names of each module, from its text."
    found = {}
    for path in sorted(package.rglob('*.py')):
        if path.name.startswith('_'): continue
        names = next((ast.literal_eval(n.value) for n in ast.parse(path.read_text()).body if isinstance(n, ast.Assign) and n.targets[0].id == '__all__'), None) if '__all__' in path.read_text() else None
        if names: found['.'.join(path.relative_to(package.parent).with_suffix('').parts)] = names
    return found

def comments(source: str) -> dict[int, str]:
    "Comments by line."
    return {t.start[0]: t.string.lstrip('# ') for t in tokenize.generate_tokens(StringIO(source).readline) if t.type == tokenize.COMMENT}

def cell(text: str) -> str: return ' '.join(text.replace('|', r'\|').split())

def code(node: ast.AST|None) -> str: return f"`{ast.unparse(node).replace(' | ', ' or ')}`" if node else ''      # a table of Markdown has no | in its cells

def function(node: ast.FunctionDef, notes: dict[int, str]) -> list[str]:
    "Docstring and a table of the parameters that have a comment."
    doc, arguments = ast.get_docstring(node) or '', [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    defaults = dict(zip([a.arg for a in [*node.args.posonlyargs, *node.args.args]][::-1], node.args.defaults[::-1])) | {a.arg: d for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults) if d}
    rows = [(f'`{a.arg}`', code(a.annotation), code(defaults.get(a.arg)), notes.get(a.lineno, '')) for a in arguments if a.arg not in ('self', 'cls')]
    last = max((a.lineno for a in arguments), default=node.lineno)
    given = notes.get(node.returns.lineno, '') if node.returns and (node.returns.lineno > last or not arguments) else ''
    if node.returns and (given or rows): rows.append(('returns', code(node.returns), '', given))
    lines = [doc, '']
    if any(r[3] for r in rows): lines += ['| parameter | type | default | |', '|---|---|---|---|', *(f"| {' | '.join(cell(c) for c in r)} |" for r in rows), '']
    return lines

def klass(node: ast.ClassDef, notes: dict[int, str]) -> list[str]:
    "Docstring, fields with their comments, methods that have a docstring."
    fields = [(f'`{n.target.id}`', code(n.annotation), code(n.value), notes.get(n.end_lineno, '')) for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    lines = [ast.get_docstring(node) or '', '']
    if fields: lines += ['| field | type | default | |', '|---|---|---|---|', *(f"| {' | '.join(cell(c) for c in r)} |" for r in fields), '']
    for n in node.body:
        if not isinstance(n, ast.FunctionDef) or (n.name.startswith('_') and n.name != '__init__') or not (ast.get_docstring(n) or n.name == '__init__'): continue
        if n.name == '__init__': lines += function(n, notes); continue
        kind = 'attribute' if any('property' in ast.unparse(d) for d in n.decorator_list) else 'method'
        lines += [f'::::{{py:{kind}}} {n.name}' + ('' if kind == 'attribute' else signature(n)), *function(n, notes), '::::', '']
    return lines

def signature(node: ast.FunctionDef) -> str:
    "Names and defaults; types stand in the table."
    a = node.args
    def shown(default): return '...' if isinstance(default, ast.IfExp) else ast.unparse(default)     # Sphinx reads no conditions
    parts = [x.arg for x in [*a.posonlyargs, *a.args]]
    parts = parts[:len(parts) - len(a.defaults)] + [f'{n}={shown(d)}' for n, d in zip(parts[len(parts) - len(a.defaults):], a.defaults)]
    if a.vararg: parts.append(f'*{a.vararg.arg}')
    elif a.kwonlyargs: parts.append('*')
    parts += [x.arg + (f'={shown(d)}' if d else '') for x, d in zip(a.kwonlyargs, a.kw_defaults)] + ([f'**{a.kwarg.arg}'] if a.kwarg else [])
    return '(' + ', '.join(p for p in parts if p not in ('self', 'cls')) + ')'

def page(
    module: str,            # such as 'synthmr.slices'
    names: list[str],       # what it exports
    path: Path,             # its file
    chapter: str,           # page of its notebook, relative to the reference
    source: str,            # address of the file in the repository
) -> str:
    "The reference of a module, in MyST."
    text = path.read_text()
    tree, notes = ast.parse(text), comments(text)
    lines = [f'# `{module}`', '', f'> {ast.get_docstring(tree) or ""}', '', f'[Chapter]({chapter}) · [source]({source})', '', f':::::{{py:module}} {module}', ':::::', '']
    for node in tree.body:
        targets = [t.id for t in getattr(node, 'targets', []) if isinstance(t, ast.Name)]
        if isinstance(node, ast.FunctionDef) and node.name in names: lines += [f':::::{{py:function}} {node.name}{signature(node)}', *function(node, notes), ':::::', '']
        elif isinstance(node, ast.ClassDef) and node.name in names:
            made = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__'), None)
            lines += [f':::::{{py:class}} {node.name}{signature(made) if made else ""}', *klass(node, notes), ':::::', '']
        elif set(targets) & set(names) and targets[0] != '__all__':
            value = cell(ast.unparse(node.value))
            lines += [f':::::{{py:data}} {targets[0]}', f'`{value if len(value) < 100 else value[:97] + "..."}` {notes.get(node.lineno, "")}', ':::::', '']
    return '\n'.join(lines)

def index(found: dict[str, list[str]]) -> dict[str, str]:
    "Names that prose can mean only one thing by, with what they refer to."
    homes = {}
    for module, names in found.items():
        homes[module] = [module]
        for name in names:
            if len(name) > 3 and ('_' in name or name != name.lower()): homes.setdefault(name, []).append(f'{module}.{name}')
            homes[f'{module.rpartition(".")[2]}.{name}'] = [f'{module}.{name}']
            homes[f'{module}.{name}'] = [f'{module}.{name}']
    return {name: places[0] for name, places in homes.items() if len(places) == 1}

def refer(markdown: str, known: dict[str, str]) -> str:
    "Link names in backticks to the reference; fenced code stays."
    def linked(m): return f'{{py:obj}}`{m[1]}{m[2]} <{known[m[1]]}>`' if m[1] in known else m[0]
    return ''.join(part if i % 2 else re.sub(r'(?<![\w`\]}])`([A-Za-z_.][\w.]*)((?:\(\))?)`(?!`)', linked, part) for i, part in enumerate(re.split(r'(```.*?```|\[[^\]\n]*\]\([^)\n]*\)|^#.*?$)', markdown, flags=re.S | re.M)))
