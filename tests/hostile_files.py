"""Reads hostile files in a process of its own with little memory; prints as JSON what was said of each and what was executed meanwhile.

    python tests/hostile_files.py FOLDER
"""
import copyreg
import importlib
import io
import json
import marshal
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np

from synthmr.generators.official import import_checkpoint
from synthmr.pickles import CheckpointError

FOLDER = Path(sys.argv[1])
CANARY = FOLDER/'canary'
TOUCH = f'touch {CANARY}'

class Call:
    "A pickle that calls something when it is loaded."
    def __init__(self, f, *args, state=None): self.f, self.args, self.state = f, args, state
    def __reduce__(self): return (self.f, self.args) if self.state is None else (self.f, self.args, self.state)

def dumps(thing, protocol=4): return pickle.dumps(thing, protocol)
def text(s): return b'\x8c' + bytes([len(s)]) + s.encode()                      # SHORT_BINUNICODE
def named(module, name): return text(module) + text(name) + b'\x93'             # STACK_GLOBAL
def program(*parts): return b'\x80\x04' + b''.join(parts) + b'.'
def legacy(value, keys=(), data=b'', little=True):
    "An old torch file."
    return b''.join(pickle.dumps(p, 2) for p in (0x1950a86a20f9469cfc6c, 1001, {'protocol_version': 1001, 'little_endian': little, 'type_sizes': {}})) + value + pickle.dumps(list(keys), 2) + data
def storage(numel, key='0', kind='FloatStorage'):
    return b'(' + text('storage') + named('torch', kind) + text(key) + text('cpu') + b'J' + struct.pack('<i', numel) + b'tQ'      # a persistent id
def number(n): return b'\x8a\x08' + struct.pack('<q', n)
def numbers(*ns): return b'(' + b''.join(map(number, ns)) + b't'
def tensor(where, offset, size, stride): return named('torch._utils', '_rebuild_tensor_v2') + b'(' + where + number(offset) + numbers(*size) + numbers(*stride) + b'\x89)tR'
def four(value): return legacy(program(value), ['0'], struct.pack('<q4f', 4, 1, 2, 3, 4))

def archive(members, compress=0, pickled=None):
    "A zip archive with these members beside a good data.pkl."
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', compress) as z:
        z.writestr('model/data.pkl', pickled or program(b'}'))
        for name, content in members: z.writestr(name, content)
    return out.getvalue()

def overlapping():
    "Two members of an archive that are the same bytes (a quoted zip bomb)."
    made = bytearray(archive([('model/data/0', b'x' * 5000), ('model/data/1', b'y' * 10)]))
    first, last = made.find(b'PK\1\2'), made.rfind(b'PK\1\2')
    second = made.find(b'PK\1\2', first + 4)
    made[last + 20:last + 28] = made[second + 20:second + 28]; made[last + 42:last + 46] = made[second + 42:second + 46]
    return bytes(made)

def network(*state): return program(named('tfutil', 'Network'), b')\x81', *state)
def within(content: bytes): return named('torch.storage', '_load_from_bytes') + b'B' + struct.pack('<I', len(content)) + content + b'\x85R'      # a torch file in a pickle

copyreg.add_extension('os', 'system', 77)       # what EXT1 would take from the registry
code = compile('import os; os.system("' + TOUCH + '")', 'x', 'exec')
laughs = b'](K\x01K\x01e' + b''.join(b'\x94](h' + bytes([i]) + b'h' + bytes([i]) + b'e' for i in range(200))
array = dumps(np.zeros(3))

def unfolding() -> bytes:
    "Sixteen modules, each of which holds the one before twice: 2^15 in all, in a file of three kilobytes."
    def module(inside): return named('torch_utils.persistence', '_reconstruct_persistent_obj') + b'}(' + text('type') + text('class') + text('class_name') + text('M') + text('state') + b'}(' + text('_parameters') + b'}' + text('_buffers') + b'}' + text('_modules') + inside + b'uu\x85R\x94'
    modules = [module(b'}')] + [module(b'}(' + text('a') + b'h' + bytes([i]) + text('b') + b'h' + bytes([i]) + b'u') for i in range(15)]
    return program(b'(' + b''.join(modules) + b't0}' + text('G_ema') + b'h\x0fs')

FILES = {   # name: content, a word of the answer
    'os.system': (b'cos\nsystem\n(S"' + TOUCH.encode() + b'"\ntR.', 'refused: os.system'),
    'posix.system': (dumps(Call(os.system, TOUCH)), 'refused: posix.system'),
    'eval': (dumps(Call(eval, f"__import__('os').system('{TOUCH}')")), 'refused: builtins.eval'),
    'exec': (dumps(Call(exec, f"open('{CANARY}','w')")), 'refused: builtins.exec'),
    'getattr': (dumps(Call(getattr, 'a', 'upper')), 'refused: builtins.getattr'),
    'import': (dumps(Call(__import__, 'antigravity')), 'refused: builtins.__import__'),
    'importlib': (dumps(Call(importlib.import_module, 'this')), 'refused: importlib.import_module'),
    'subprocess': (dumps(Call(subprocess.Popen, ['touch', str(CANARY)])), 'refused: subprocess.Popen'),
    'open': (dumps(Call(open, str(CANARY), 'w')), 'refused: io.open'),
    'compile': (dumps(Call(compile, '1', 'x', 'eval')), 'refused: builtins.compile'),
    'python 2': (dumps(Call(eval, '1'), 2), 'refused: __builtin__.eval'),
    'function': (program(named('types', 'FunctionType')), 'refused: types.FunctionType'),
    'code object': (program(named('types', 'CodeType'), b'('), 'refused: types.CodeType'),
    'marshal': (dumps(Call(marshal.loads, marshal.dumps(code))), 'refused: marshal.loads'),
    'torch.load': (program(named('torch', 'load')), 'refused: torch.load'),
    'torch.hub': (program(named('torch.hub', 'load')), 'refused: torch.hub.load'),
    'numpy.load': (dumps(Call(np.load, 'x.npy')), 'refused: numpy.load'),
    'a parameter with a state': (program(named('torch._utils', '_rebuild_parameter_with_state')), 'refused: torch._utils._rebuild_parameter_with_state'),
    'pickle in a pickle': (dumps(Call(pickle.loads, dumps(Call(os.system, TOUCH)))), 'refused: _pickle.loads'),
    'within a list': (dumps([{'a': ({'b': Call(os.system, TOUCH)},)}]), 'refused: posix.system'),
    'within an ordered dictionary': (program(named('collections', 'OrderedDict'), b'](](X\x01\x00\x00\x00a', named('os', 'system'), b'ee\x85R'), 'refused: os.system'),
    'within a class of the file': (network(b'}', text('name'), named('os', 'system'), b'sb'), 'refused: os.system'),
    'within a torch file': (legacy(dumps(Call(os.system, TOUCH), 2)), 'refused: posix.system'),
    'within a torch file of a pickle': (program(within(legacy(b'cos\nsystem\n.'))), 'refused: os.system'),
    'a torch file in one in one': (program(within(legacy(program(within(b''))))), 'refused: torch.storage._load_from_bytes'),
    'within an archive': (archive([], pickled=dumps(Call(os.system, TOUCH), 2)), 'refused: posix.system'),
    'a way through attributes': (program(named('collections', 'OrderedDict.__init__.__globals__')), 'refused: collections.OrderedDict.__init__.__globals__'),
    'a name that is computed': (program(text('os'), named('_codecs', 'encode'), text('system'), b'\x85R\x93'), 'a name that is not text but of type bytes'),
    'a module that is computed': (program(b')', text('system'), b'\x93'), 'a name that is not text but of type tuple'),
    'a name that would colour the terminal': (program(named('os\x1b[31m', 'sys\ntem')), r'refused: os\x1b[31m.sys\ntem'),
    'a long name': (program(b'X' + struct.pack('<I', 100_000) + b'a' * 100_000, text('b'), b'\x93'), 'refused: aaaa'),
    'INST': (b'(S"' + TOUCH.encode() + b'"\nios\nsystem\n.', 'refused: os.system (opcode INST)'),
    'OBJ': (b'(cos\nsystem\nS"x"\no.', 'refused: os.system'),
    'OBJ of what is known': (b'(ccollections\nOrderedDict\no.', 'refused: opcode OBJ'),
    'NEWOBJ': (program(named('collections', 'OrderedDict'), b']\x81'), 'to make an object of collections.OrderedDict'),
    'NEWOBJ of text': (program(text('x'), b')\x81'), 'to make an object of str'),
    'NEWOBJ_EX': (program(named('collections', 'OrderedDict'), b')}\x92'), 'refused: opcode NEWOBJ_EX'),
    'EXT1': (b'\x80\x02\x82\x4d.', 'refused: opcode EXT1 (77)'),
    'EXT2': (b'\x80\x02\x83\x4d\x00.', 'refused: opcode EXT2 (77)'),
    'EXT4': (b'\x80\x02\x84\x4d\x00\x00\x00.', 'refused: opcode EXT4 (77)'),
    'a persistent id': (program(text('x'), b'Q'), 'refused: a persistent id'),
    'a persistent id in text': (b'Pos.system\n.', 'refused: opcode PERSID (os.system)'),
    'a persistent module': (legacy(program(b'(', text('module'), text('x'), text('y'), text('import os'), b'tQ')), 'a persistent id that is no storage'),
    'a buffer from elsewhere': (b'\x80\x05\x97.', 'refused: opcode NEXT_BUFFER'),
    'to call a list': (program(b'])R'), 'to call a value of type list'),
    'to call a type': (program(named('torch', 'FloatStorage'), b')R'), 'to call torch.FloatStorage'),
    'to call without arguments in a tuple': (program(named('collections', 'OrderedDict'), b'](K\x01eR'), 'to call collections.OrderedDict with a value of type list'),
    'BUILD of a list': (program(b']}b'), 'BUILD of a value of type list'),
    'BUILD of a class': (program(named('torch', 'FloatStorage'), b'}', text('__call__'), text('x'), b'sb'), 'BUILD of a value of type Name'),
    'BUILD of a function': (program(named('torch._utils', '_rebuild_tensor_v2'), b'}b'), 'BUILD of a value of type Name'),
    'BUILD twice': (network(b'}b}b'), 'BUILD of tfutil.Network twice'),
    'BUILD with slots': (network(b'}}\x86b'), 'BUILD of tfutil.Network with a value of type tuple'),
    'BUILD of attributes': (program(named('collections', 'OrderedDict'), b')R]b'), 'BUILD of a dictionary with a value of type list'),
    'attributes that are methods': (network(b'}', text('__setstate__'), text('x'), b's', text('__class__'), text('y'), b's', text('__reduce__'), text('z'), b'sb'), 'holds none of the generators'),
    'a key that is a tuple': (program(b'})', b'\x85' * 300_000, b'Ns'), 'a key of type tuple'),
    'a key with any hash': (program(b'}\x8a\x0a' + (1 << 75).to_bytes(10, 'little') + b'Ns'), 'a key of type int over 60 bits'),
    'a set of tuples': (program(named('builtins', 'set'), b'](', b')', b'\x85' * 1000, b'e\x85R'), 'a key of type tuple'),
    'another codec': (program(named('_codecs', 'encode'), text('x'), text('zlib'), b'\x86R'), 'refused: _codecs.encode with zlib'),
    'an object of another type': (program(named('torch_utils.persistence', '_reconstruct_persistent_obj'), b'}', text('type'), text('function'), b's\x85R'), 'without class and state'),
    'deep nesting': (program(b')', b'\x85' * 2_500_000), 'more than 2,000,000 opcodes'),
    'deep nesting within the limit': (program(b')', b'\x85' * 1_500_000), 'holds none of the generators'),
    'deep lists': (program(b']' * 800_000, b'a' * 799_999), 'holds none of the generators'),
    'a billion laughs': (program(laughs), 'holds none of the generators'),
    'a billion laughs of modules': (unfolding(), 'more than 20,000 tensors, modules and attributes'),
    'DUP': (program(b']', b'2' * 100_000, b'a' * 99_999), 'holds none of the generators'),
    'text that is encoded again and again': (program(b'X' + struct.pack('<I', 1 << 20) + b'a' * (1 << 20) + b'\x94' + named('_codecs', 'encode') + b'\x940', b'0', b'(' + b'h\x01h\x00\x85R' * 2000 + b't'), 'to unfold to more than 2 times'),
    'a terabyte of bytes': (dumps(Call(bytearray, 10**12)), 'refused: builtins.bytearray'),
    'bytes that are not there': (program(b'\x8e' + struct.pack('<Q', 1 << 40) + b'x'), 'is damaged'),
    'more bytes than there can be': (program(b'\x8e' + struct.pack('<Q', (1 << 64) - 1) + b'x'), 'is damaged'),
    'text that is not there': (program(b'\x8d' + struct.pack('<Q', 1 << 40) + b'x'), 'is damaged'),
    'a byte array that is not there': (b'\x80\x05\x96' + struct.pack('<Q', 1 << 40) + b'x.', 'is damaged'),
    'a frame that is not there': (program(b'\x95' + struct.pack('<Q', 1 << 60) + b'N'), 'holds none of the generators'),
    'a number of many digits': (b'L' + b'9' * 1_000_000 + b'L\n.', 'is damaged'),
    'a number of many bytes': (program(b'\x8b' + struct.pack('<i', 1_000_000) + b'\x7f' * 1_000_000), 'holds none of the generators'),
    'the largest memo': (program(b'Nr\xff\xff\xff\x7f'), 'holds none of the generators'),
    'a memo that is empty': (program(b'h\x07'), 'is damaged'),
    'an empty stack': (b'\x80\x04.', 'is damaged'),
    'a stack that is too short': (program(b'R'), 'is damaged'),
    'marks that are not there': (program(b't'), 'is damaged'),
    'no end': (b'\x80\x04N', 'is damaged'),
    'an unknown opcode': (b'\x80\x04\xff.', 'is damaged'),
    'an array of objects': (dumps(np.array([Call(os.system, TOUCH)], dtype=object)), 'refused: numpy.dtype O8'),
    'an array of records': (dumps(np.zeros(2, [('a', 'f4'), ('b', 'O')])), 'refused: numpy.dtype V12'),
    'an array that is too large': (array.replace(b'K\x03\x85', b'\x8a\x05\xff\xff\xff\xff\x7f\x85'), 'bytes, 24 are there'),
    'an array with 64 axes': (array.replace(b'K\x03\x85', b'(' + b'K\x01' * 64 + b't'), 'a tensor of 64 axes'),
    'an array with a negative axis': (array.replace(b'K\x03\x85', b'J\xfd\xff\xff\xff\x85'), 'not made of natural numbers'),
    'an array twice': (array[:-1] + b'(K\x01K\x00\x85NNNtb.', 'BUILD of a numpy array twice'),
    'a scalar of objects': (program(named('numpy.core.multiarray', 'scalar'), b'N', b'C\x01x', b'\x86R'), 'a numpy scalar that is no number'),
    'an array of another class': (program(named('numpy.core.multiarray', '_reconstruct'), text('x'), b')', text('b'), b'\x87R'), 'a numpy array of another class'),
    'beyond the storage': (four(tensor(storage(4), 1, [4], [1])), 'outside of its storage of 4 numbers'),
    'before the storage': (four(tensor(storage(4), -1, [1], [1])), 'outside of its storage of 4 numbers'),
    'strides out of the storage': (four(tensor(storage(4), 0, [2, 2], [1, 1 << 39])), 'outside of its storage of 4 numbers'),
    'negative strides': (four(tensor(storage(4), 3, [2], [-1])), 'not made of natural numbers'),
    'strides that overflow': (four(tensor(storage(4), 0, [2], [(1 << 62) + 1])), 'not made of natural numbers'),
    'a number a billion times': (four(tensor(storage(4), 0, [1 << 30], [0])), 'of a storage of 4 numbers'),
    'a storage that is not there': (four(tensor(storage(1 << 30), 0, [1], [1])), 'holds 4 numbers, 1,073,741,824 are named'),
    'a storage of two types': (four(tensor(storage(4), 0, [1], [1]) + tensor(storage(4, kind='DoubleStorage'), 0, [1], [1])), 'with two types or sizes'),
    'a storage of an unknown type': (four(tensor(storage(4, kind='QInt8Storage'), 0, [1], [1])), 'refused: torch.QInt8Storage'),
    'a tensor without a storage': (four(tensor(text('x'), 0, [1], [1])), 'a tensor without a storage'),
    'a storage that ends too soon': (legacy(program(tensor(storage(1000), 0, [1], [1])), ['0'], struct.pack('<q', 1000) + bytes(100)), 'truncated: 100 of 4,000 bytes'),
    'other storages than are named': (legacy(program(tensor(storage(4), 0, [1], [1])), ['7'], bytes(24)), 'its storages are not those that are named'),
    'big endian': (legacy(program(b'N'), little=False), 'unknown version or byte order'),
    'a name out of the folder': (archive([('../../etc/cron.d/x', b'x')]), 'refused: the name ../../etc/cron.d/x'),
    'an absolute name': (archive([('/etc/passwd', b'x')]), 'refused: the name /etc/passwd'),
    'a name of a drive': (archive([('C:/x', b'x')]), 'refused: the name C:/x'),
    'a name with backslashes': (archive([('a\\..\\x', b'x')]), 'in a zip archive'),
    'a name twice': (archive([('model/x', b'1'), ('model/x', b'2')]), 'model/x twice'),
    'an archive that unfolds': (archive([('model/data/0', bytes(200_000_000))], zipfile.ZIP_DEFLATED), 'compressed or encrypted'),
    'an archive that unfolds otherwise': (archive([('model/data/0', bytes(20_000_000))], zipfile.ZIP_LZMA), 'compressed or encrypted'),
    'members over one another': (overlapping(), 'lies over another member'),
    'TorchScript': (archive([('model/code/__torch__.py', b'import os')]), 'a TorchScript archive, which holds code'),
    'an archive without data': (archive([], pickled=None).replace(b'data.pkl', b'data.txt'), 'it has no data.pkl'),
    'an archive of a broken end': (archive([('model/x', b'1')])[:-30], 'no valid zip archive'),
    'a storage of another size': (archive([('model/data/0', bytes(8))], pickled=program(tensor(storage(4), 0, [1], [1]))), 'model/data/0: 8 bytes, 16 are named'),
    'a storage that is missing': (archive([], pickled=program(tensor(storage(4, '../../../etc/passwd'), 0, [1], [1]))), 'is missing in its zip archive'),
}

EVENTS, watching = [], False
HARMLESS = {'open', 'os.listdir', 'os.scandir', 'object.__getattr__', 'sys._getframe', 'builtins.id', 'gc.get_objects'}
def watch(event, arguments):
    if not watching or event in HARMLESS and not (event == 'open' and isinstance(arguments[1], str) and set(arguments[1]) & set('wax+')): return
    EVENTS.append(f'{event} {str(arguments)[:200]}')

def read(path: Path) -> str:
    "What is said of a file."
    try: import_checkpoint(path, FOLDER/'made')
    except CheckpointError as e: return str(e)
    return 'it was imported'

for name in ('warm.pkl', 'warm.pt'):       # what is imported at the first reading is not the file's doing
    (FOLDER/name).write_bytes(program(b'N') if name.endswith('l') else archive([]))
    read(FOLDER/name)
sys.addaudithook(watch)
space = next(int(line.split()[1]) * 1024 for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmSize'))
resource.setrlimit(resource.RLIMIT_AS, (space + (1500 << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))

result, before = {}, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, (content, words) in FILES.items():
    path = FOLDER/f'{name}.pkl'
    path.write_bytes(content)
    watching, began = True, time.process_time()
    said = read(path)
    watching = False
    result[name] = {'file': str(path), 'words': words, 'said': said, 'seconds': time.process_time() - began}
canary, megabytes = CANARY.exists(), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

would = 0
for name in ('os.system', 'posix.system', 'eval', 'exec', 'subprocess', 'pickle in a pickle', 'within a list', 'EXT1'):     # the same with Python's unpickler, to see that the files are what they claim
    CANARY.unlink(missing_ok=True)
    try: loaded = pickle.loads(FILES[name][0])
    except Exception: loaded = None
    if isinstance(loaded, subprocess.Popen): loaded.wait()
    would += CANARY.exists() or name == 'EXT1' and loaded is os.system
print(json.dumps({'files': result, 'events': EVENTS, 'canary': canary, 'megabytes': megabytes, 'would_have': would}))
