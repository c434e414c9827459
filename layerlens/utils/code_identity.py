"""What a function, a class or an object of the user's is made of, as a digest: part of the key of all that is kept.

``model.loss: "project:loss"`` is the same name after the function was edited, so names do not tell code apart. A
function is read as Python runs it: its bytecode (notebooks and ``exec`` have it too, and comments are not in it), its
defaults, what its closure holds, the globals and the attributes of modules that it uses, and what it imports when it is
called. A class is read with its bases and methods, an object with its class and with its state as ``pickle`` takes it.
Whatever is reached in this way is read too.

Code that was installed as a package (the standard library and LayerLens too) is read by name and version, unless other
code was put in its place. What is neither bytecode, a compiled file of the user's, nor a state that can be taken (an
open file, a generator) is ``unknown``: whoever keeps results must then not take them for those of the same code.
What a function reads from outside of Python when it is called (files, the environment) is not seen.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import importlib.util
import sys
import sysconfig
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ATOMS = (type(None), bool, int, float, complex, str, bytes, bytearray, type(...), range)
CLASS_FACTS = frozenset(
    ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__annotate__", "__firstlineno__",
     "__static_attributes__", "__abstractmethods__", "_abc_impl", "__orig_bases__", "__parameters__", "__qualname__")
)  # fmt: skip
"""Attributes of a class that change nothing that it computes, or are made of the others."""
BY_NAME = frozenset(
    ("getattr", "globals", "locals", "vars", "eval", "exec", "__import__", "import_module", "__dict__", "attrgetter",
     "methodcaller")
)  # fmt: skip
"""What a function reaches others by that its bytecode does not name: all code of the user's is then read."""
DESCRIPTORS = (
    types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType, types.MethodWrapperType,
)  # fmt: skip
LOCKS = (type(threading.Lock()), type(threading.RLock()))
Reader = Callable[["Walk", Any], "list[bytes] | None"]


@dataclass(frozen=True)
class CodeIdentity:
    """What some code is.

    Args:
        digest: SHA-256; the same in every process that has the same code, state and versions.
        unknown: what could not be read: where it was met, and what it is.
    """

    digest: str
    unknown: Mapping[str, str]


def code_identity(parts: Mapping[str, Any], readers: Sequence[Reader] = ()) -> CodeIdentity:
    """The identity of some objects by name.

    Args:
        parts: what messages call each, and the object.
        readers: asked before the rules of this module for what an object is made of; None where they do not know it.
    """
    walk = Walk(readers)
    found = [walk.digest(value, name) for name, value in parts.items()]
    return CodeIdentity(hashlib.sha256(b"".join(found)).hexdigest(), dict(walk.unknown))


class Walk:
    """From an object to all that it is made of; every object is read once.

    Attributes:
        unknown: see ``CodeIdentity``.
        strict: whether what cannot be read is unknown; else its class stands for it.
    """

    def __init__(self, readers: Sequence[Reader] = ()) -> None:
        self.readers = readers
        self.unknown: dict[str, str] = {}
        self.strict = True
        self._done: dict[int, bytes] = {}
        self._open: set[int] = set()
        self._kept: list[Any] = []
        self._path: list[str] = []

    def known(self, value: Any, name: str) -> None:
        """Let a name stand for an object wherever it is met from now on."""
        self._kept.append(value)
        self._done[id(value)] = _hash("known", [name.encode()])

    @contextmanager
    def tolerant(self) -> Iterator[None]:
        """What is met within, and cannot be read, is identified by its class alone."""
        before, self.strict = self.strict, False
        try:
            yield
        finally:
            self.strict = before

    def digest(self, value: Any, name: str) -> bytes:
        """The digest of an object.

        Args:
            value: the object.
            name: what it is called where it is met.
        """
        if type(value) in ATOMS:
            return _hash(type(value).__name__, [repr(value).encode("utf-8", "surrogatepass")])
        key = id(value)
        if key in self._done:
            return self._done[key]
        if key in self._open:
            return b"around"
        self._open.add(key)
        self._kept.append(value)  # an id is of one object only as long as that lives
        self._path.append(name)
        try:
            found = _hash(type(value).__qualname__, self._parts(value))
        except RecursionError:
            found = self.not_read(value, "is nested too deep")
        finally:
            self._path.pop()
            self._open.discard(key)
        self._done[key] = found
        return found

    def digests(self, values: Iterable[Any], name: str) -> list[bytes]:
        """The digests of several."""
        return [self.digest(value, name) for value in values]

    def not_read(self, value: Any, reason: str = "") -> bytes:
        """The class of what cannot be read; it is unknown from now on."""
        kind = type(value)
        if self.strict:
            where = " → ".join(dict.fromkeys(part for part in self._path if part))
            self.unknown[where] = reason or f"a {kind.__module__}.{kind.__qualname__}, whose state cannot be read"
        return _hash("not read", [f"{kind.__module__}.{kind.__qualname__}".encode()])

    def _parts(self, value: Any) -> list[bytes]:
        for reader in self.readers:
            found = reader(self, value)
            if found is not None:
                return found
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.CodeType):
            return self._code(value, {}, "")
        if isinstance(value, types.ModuleType):
            return self._module(value, ())
        if type(value) in (tuple, list):
            if all(type(one) in ATOMS for one in value):
                return [repr(value).encode("utf-8", "surrogatepass")]
            return self.digests(value, "")
        if type(value) in (dict, types.MappingProxyType):
            return [part for key, one in value.items() for part in (self.digest(key, ""), self.digest(one, str(key)))]
        if type(value) in (set, frozenset):
            return sorted(self.digests(value, ""))
        if type(value) is types.CellType:
            try:
                return [self.digest(value.cell_contents, "")]
            except ValueError:
                return [b"empty"]
        return self._callable(value) or self._object(value)

    def _callable(self, value: Any) -> list[bytes] | None:
        if isinstance(value, types.MethodType):
            return [self.digest(value.__func__, ""), self.digest(value.__self__, "self")]
        if isinstance(value, types.BuiltinFunctionType):
            return self._builtin(value)
        if isinstance(value, DESCRIPTORS):
            return [str(getattr(value, "__qualname__", value.__name__)).encode()]
        if isinstance(value, (staticmethod, classmethod)):
            return [self.digest(value.__func__, "")]
        if isinstance(value, property):
            return self.digests((value.fget, value.fset, value.fdel), "")
        if isinstance(value, (functools.partial, functools.partialmethod)):
            return [self.digest(part, "") for part in (value.func, value.args, dict(value.keywords))]
        if isinstance(value, functools.cached_property):
            return [self.digest(value.func, "")]
        if isinstance(value, functools._lru_cache_wrapper):
            return [self.digest(value.__wrapped__, "")]
        return None

    def _builtin(self, value: types.BuiltinFunctionType) -> list[bytes]:
        owner = value.__self__
        if owner is None or isinstance(owner, types.ModuleType):
            module = sys.modules.get(value.__module__ or "", owner)
            own = isinstance(module, types.ModuleType) and is_own(getattr(module, "__file__", None))
            content = _file_content(module) if own else _version_of(value.__module__ or "builtins")
            return [value.__qualname__.encode(), content]
        return [value.__qualname__.encode(), self.digest(owner, "self")]

    def _function(self, function: types.FunctionType) -> list[bytes]:
        own = is_own(function.__code__.co_filename)
        if own:
            self._path.append(function.__qualname__)
        try:
            cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            closure = [self.digest(cell, name if own else "") for name, cell in cells]
            if not own:
                wrapped = [self.digest(one, "") for one in vars(function).values() if callable(one)]
                return [_named(function), *closure, *wrapped]
            around = [function.__defaults__, function.__kwdefaults__, dict(vars(function))]
            code = self._code(function.__code__, function.__globals__, function.__globals__.get("__package__") or "")
            return [*code, *closure, *self.digests(around, "")]
        finally:
            if own:
                self._path.pop()

    def _code(self, code: types.CodeType, names: Mapping[str, Any], package: str) -> list[bytes]:
        """The instructions, and what they use of the globals ``names``."""
        facts = (
            code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags, code.co_names,
            code.co_varnames, code.co_freevars, code.co_cellvars, getattr(code, "co_exceptiontable", b""),
        )  # fmt: skip
        parts = [code.co_code, repr(facts).encode()]
        parts += [_hash("const", self._code(one, {}, "") if isinstance(one, types.CodeType) else [self.digest(one, "")])
                  for one in code.co_consts]  # fmt: skip
        used, attributes, imported = _uses(code)
        for name in sorted(used & names.keys()):
            value = names[name]
            if isinstance(value, types.ModuleType):
                parts.append(_hash(name, self._module(value, attributes)))
            else:
                parts += [name.encode(), self.digest(value, name)]
        for name, level in sorted(imported) if names else ():
            parts += self._imported("." * level + name, package, attributes)
        if names and (used | attributes) & BY_NAME:
            parts += _own_modules()
        return parts

    def _imported(self, name: str, package: str, attributes: frozenset[str]) -> list[bytes]:
        """A module that a function imports when it is called."""
        try:
            full = importlib.util.resolve_name(name, package)
        except ImportError:
            return [name.encode()]
        if full in sys.modules:
            return [full.encode(), *self._module(sys.modules[full], attributes)]
        try:
            found = importlib.util.find_spec(full)
        except (ImportError, ValueError, AttributeError):
            found = None
        if found is None or not is_own(found.origin):
            return [full.encode(), _version_of(full)]
        return [full.encode(), self._source(Path(str(found.origin)), found.parent or "")]

    def _source(self, path: Path, package: str) -> bytes:
        """A file that nobody has imported yet, and those that it imports."""
        key = hash(str(path))
        if key in self._open:
            return b"around"
        self._open.add(key)
        try:
            content = path.read_bytes()
            parts = [content]
            if path.suffix == ".py":
                code = compile(content, str(path), "exec")
                _, attributes, imported = _uses(code)
                for name, level in sorted(imported):
                    parts += self._imported("." * level + name, package, attributes)
            return _hash("source", parts)
        except (OSError, SyntaxError, ValueError):
            return self.not_read(path, f"{path} cannot be read")
        finally:
            self._open.discard(key)

    def _module(self, module: types.ModuleType, attributes: Iterable[str]) -> list[bytes]:
        """What of a module is used: of one of the user's the attributes that the code names."""
        file = getattr(module, "__file__", None)
        if not is_own(file) and module.__name__ != "__main__":
            patched = [_hash(name, [self.digest(value, name)])
                       for name, value in _patches(module) if name in attributes]  # fmt: skip
            return [module.__name__.encode(), _version_of(module.__name__), *patched]
        if file is not None and Path(file).suffix not in (".py", ".pyc", ".ipynb"):
            return [module.__name__.encode(), _file_content(module)]
        parts = [module.__name__.encode()]
        for name in sorted(set(attributes) & vars(module).keys()):
            value = vars(module)[name]
            if isinstance(value, types.ModuleType):
                key = id(value)
                if key not in self._open:
                    self._open.add(key)
                    parts.append(_hash(name, self._module(value, attributes)))
                    self._open.discard(key)
            else:
                parts += [name.encode(), self.digest(value, name)]
        return parts

    def _class(self, kind: type) -> list[bytes]:
        if not is_own_class(kind):
            patched = [_hash(name, [self.digest(value, name)]) for name, value in _patches(kind)]
            return [f"{kind.__module__}.{kind.__qualname__}".encode(), _version_of(kind.__module__), *patched]
        parts = [kind.__qualname__.encode(), *self.digests((*kind.__bases__, type(kind)), "")]
        for name in sorted(vars(kind).keys() - CLASS_FACTS):
            value = vars(kind)[name]
            if name.startswith("__") and not callable(value):  # what decorators leave (``__pydantic_validator__``)
                with self.tolerant():
                    parts += [name.encode(), self.digest(value, name)]
            else:
                parts += [name.encode(), self.digest(value, f"{kind.__qualname__}.{name}")]
        return parts

    def _object(self, value: Any) -> list[bytes]:
        """An object's class and state."""
        if isinstance(value, enum.Enum):
            return [self.digest(type(value), ""), value.name.encode()]
        if isinstance(value, LOCKS):
            return []
        kind = self.digest(type(value), "")
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:  # whatever classes raise that cannot be pickled
            if is_own_class(type(value)) and hasattr(value, "__dict__"):
                return [kind, self.digest(dict(vars(value)), "")]
            return [kind, self.not_read(value)]
        if isinstance(reduced, str):
            return [kind, reduced.encode()]
        function, args, state, items, pairs = (*reduced, None, None, None)[:5]
        args = tuple(one for one in args if one is not value)
        parts = [kind, self.digest(function, ""), *self.digests(args, ""), self.digest(state, "")]
        parts += self.digests(items or (), "")
        return parts + [self.digest(one, "") for pair in pairs or () for one in pair]


def is_own(file: str | None) -> bool:
    """Whether code in this file is the user's: not Python's, not LayerLens's, and of no package of an index."""
    if file is None or file == "built-in" or file.startswith("<frozen"):
        return False
    if file.startswith("<"):  # a notebook's, or made by exec
        return True
    path = Path(file)
    for part, name in zip(path.parts, path.parts[1:], strict=False):
        if part in ("site-packages", "dist-packages"):
            return _of_directory(name.partition(".")[0])
    return not any(file.startswith(root) for root in _installed_roots())


def is_own_class(kind: type) -> bool:
    """Whether a class is the user's."""
    module = sys.modules.get(kind.__module__)
    if module is None or kind.__module__ == "__main__":
        return True
    file = getattr(module, "__file__", None)
    return is_own(file) if file is not None else kind.__module__ not in sys.builtin_module_names


@functools.cache
def _installed_roots() -> tuple[str, ...]:
    import layerlens

    own = str(Path(layerlens.__file__).parent) + "/"
    return (own, *{sysconfig.get_paths()[name] + "/" for name in ("stdlib", "platstdlib")})


@functools.cache
def _of_directory(top: str) -> bool:
    """Whether a package was installed from a directory, so that its version says nothing of what is in it."""
    found = _distribution(top)
    if found is None:
        return False
    return "dir_info" in (found.read_text("direct_url.json") or "")


@functools.cache
def _distribution(top: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(top)
    except (metadata.PackageNotFoundError, ValueError):  # PIL is of Pillow
        return next((one for one in metadata.distributions() if _holds(one, top)), None)


def _holds(distribution: metadata.Distribution, top: str) -> bool:
    """Whether a package or module ``top`` is of it; ``packages_distributions`` makes all paths, which takes seconds."""
    if top in (distribution.read_text("top_level.txt") or "").split():
        return True
    files = "\n" + (distribution.read_text("RECORD") or "")
    return f"\n{top}/" in files or f"\n{top}.py," in files


@functools.cache
def _version_of(module: str) -> bytes:
    """The version of the package that a module is of; "" for Python's own, whose version every key has."""
    top = module.partition(".")[0]
    if not top or top in sys.stdlib_module_names or top == "layerlens":
        return b""
    found = _distribution(top)
    return b"" if found is None else f"{top}=={found.version}".encode()


def _named(value: Any) -> bytes:
    return f"{value.__module__}.{value.__qualname__} ".encode() + _version_of(value.__module__ or "")


def _file_content(module: types.ModuleType | None) -> bytes:
    try:
        return hashlib.sha256(Path(str(getattr(module, "__file__", ""))).read_bytes()).digest()
    except OSError:
        return b"absent"


def _patches(owner: types.ModuleType | type) -> list[tuple[str, types.FunctionType]]:
    """Functions of the user's that stand in an installed module or class."""
    return [
        (name, value)
        for name, value in sorted(vars(owner).items())
        if isinstance(value, types.FunctionType)
        and is_own(value.__code__.co_filename)
        and not _is_generated(value.__code__.co_filename)
    ]


def _is_generated(file: str) -> bool:
    """Whether dataclasses or others made the code of text (``<string>``); else somebody typed it into a prompt."""
    return file.startswith("<") and not file.startswith(("<ipython", "<stdin"))


def _own_modules() -> list[bytes]:
    """All modules of the user's that are loaded, by the content of their files."""
    loaded = [(name, module) for name, module in sorted(sys.modules.items()) if isinstance(module, types.ModuleType)]
    own = [(name, module) for name, module in loaded if is_own(getattr(module, "__file__", None))]
    return [part for name, module in own for part in (name.encode(), _file_content(module))]


@functools.cache
def _uses(code: types.CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[tuple[str, int]]]:
    """(globals that are read, all names, (module, level) of imports) of some code and the functions in it."""
    used, imported = set(), set()
    names = set(code.co_names)
    level: Any = 0
    before: list[dis.Instruction] = []
    for one in dis.get_instructions(code):
        if one.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            used.add(one.argval)
        elif one.opname == "IMPORT_NAME":
            level = before[-2].argval if len(before) > 1 else 0
            imported.add((one.argval, level if isinstance(level, int) else 0))
        before.append(one)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more = _uses(inner)
            used, names, imported = used | more[0], names | more[1], imported | more[2]
    return frozenset(used), frozenset(names), frozenset(imported)


def _hash(kind: str, parts: Sequence[bytes]) -> bytes:
    digest = hashlib.sha256(f"{kind}:{len(parts)};".encode())
    for part in parts:
        digest.update(f"{len(part)}:".encode() + part)
    return digest.digest()
