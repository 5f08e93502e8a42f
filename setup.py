"Installs synthmr; every fact stands in settings.ini, which nbdev reads too."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
settings = ConfigParser(delimiters=['='])
settings.read(here/'settings.ini', encoding='utf-8')
s = settings['DEFAULT']

setup(
    name=s['lib_name'],
    version=s['version'],
    description=s['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=s['author'],
    author_email=s['author_email'],
    url=s['git_url'],
    keywords=s['keywords'],
    license='Apache-2.0',
    classifiers=['Intended Audience :: Science/Research', 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Medical Science Apps.'],
    python_requires='>=' + s['min_python'],
    install_requires=s['requirements'].split(),
    extras_require={'dev': s['dev_requirements'].split(), 'slurm': s['slurm_requirements'].split(), 'viewer': s['viewer_requirements'].split()},
    # The report templates are notebooks of `nbs/reports`; an installed package carries them as `synthmr.templates`.
    packages=[*find_packages(include=['synthmr', 'synthmr.*']), 'synthmr.templates'],
    package_dir={'synthmr.templates': 'nbs/reports'},
    package_data={'synthmr': ['data/splits/*.csv', 'data/published/*', 'studies/Snakefile', 'studies/*.html', 'studies/profiles/*/*.yaml'], 'synthmr.templates': ['*.ipynb']},
    entry_points={'console_scripts': s['console_scripts'].split()},
    zip_safe=False,
)
