"The bibliography: a page made of `references.bib`, and links to it wherever prose names authors and a year."
import re
import unicodedata
from pathlib import Path

from pybtex.database import Entry, Person, parse_file
from pybtex.richtext import Text

CITED = re.compile(r"((?:van )?[A-ZÀ-Þ][\w'’-]+)( et al\.?| and ([A-ZÀ-Þ][\w'’-]+))?( \(| )((?:19|20)\d\d)\b")
KEPT = re.compile(r'(```.*?```|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$|\[[^\]\n]*\]\([^)\n]*\)|^#.*?$|<[^>\n]+>)', re.S | re.M)    # code, formulas, links, headings: not prose

def plain(text: str) -> str:
    "LaTeX as letters."
    return str(Text.from_latex(text))

def surname(person: Person) -> str: return plain(' '.join([*person.prelast_names, *person.last_names]))

def label(name: str, year: str) -> str:
    "What a citation links to; two works of the same authors and year share it."
    ascii = unicodedata.normalize('NFKD', name.replace('ł', 'l')).encode('ascii', 'ignore').decode()
    return f"ref-{re.sub('[^a-z]+', '-', ascii.lower())}-{year}"

def read(bib: Path) -> dict[str, list[Entry]]:
    "Entries by label, in the order of the bibliography: by first author, then year."
    entries = sorted(parse_file(str(bib)).entries.values(), key=lambda e: (label(surname(e.persons['author'][0]), e.fields['year']), e.key))
    found = {}
    for e in entries: found.setdefault(label(surname(e.persons['author'][0]), e.fields['year']), []).append(e)
    return found

def person(p: Person) -> str:
    "Initials and surname."
    names = [plain(n) for n in [*p.first_names, *p.middle_names]]
    initials = ' '.join('-'.join(f'{part[0]}.' for part in n.split('-')) for n in names)
    return f'{initials} {surname(p)}'.strip()

def entry(e: Entry) -> str:
    "One work, in Markdown."
    people = ['et al.' if str(p) == 'others' else person(p) for p in e.persons['author']]
    authors = people[0] if len(people) == 1 else ', '.join(people[:-1]) + (' ' if people[-1] == 'et al.' else ' and ') + people[-1]
    where = e.fields.get('journal') or e.fields.get('booktitle', '')
    volume = ' '.join(filter(None, [e.fields.get('volume', ''), e.fields.get('pages', '').replace('--', '–')]))
    at = f"[doi:{e.fields['doi']}](https://doi.org/{e.fields['doi']})" if 'doi' in e.fields else f"[arXiv:{e.fields['eprint']}](https://arxiv.org/abs/{e.fields['eprint']})" if 'eprint' in e.fields else ''
    place = ' '.join(filter(None, [where and f'*{plain(where)}*', volume, f"({e.fields['year']})"]))
    return ' '.join(filter(None, [f"{authors}.", plain(e.fields['title']).rstrip('.?') + ('?' if e.fields['title'].endswith('?') else '.'), place + '.', at]))

def page(works: dict[str, list[Entry]]) -> str:
    "The bibliography, in MyST."
    return '# Bibliography\n\n' + '\n'.join(f'({name})=\n' + '\n'.join(f'- {entry(e)}' for e in group) + '\n' for name, group in works.items())

def cite(
    markdown: str,
    works: dict[str, list[Entry]],
) -> tuple[str, list[str]]:     # with links; what is cited and not in the bibliography
    "Link authors and years to the bibliography."
    unknown = []
    def linked(m):
        name, rest, second, gap, year = m.groups()
        target = label(name, year)
        if target not in works:
            if rest: unknown.append(m[0])
            return m[0]
        who = name + (rest or '')
        return f'[{who} {year}](#{target})' if gap == ' ' else f'[{who}](#{target}) ({year}'
    return ''.join(part if i % 2 else CITED.sub(linked, part) for i, part in enumerate(KEPT.split(markdown))), unknown
