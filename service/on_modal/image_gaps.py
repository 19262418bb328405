"""What a planned image lacks for the user's own code, as far as its source and the configuration tell.

Nothing is imported or run: imports, and texts that name a file, are read from the syntax tree. Names that are put
together at run time are not found.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from modalkit.service.loading import find_top_module
from modalkit.service.on_modal.image import ImagePlan, in_container
from modalkit.service.on_modal.image_code import SOURCE_FOLDER, own_package
from modalkit.service.settings import Settings

MAX_NAME_CHARACTERS = 255

_IMPORT_FAILURES = {"ImportError", "ModuleNotFoundError", "Exception"}


def image_gaps(plan: ImagePlan, settings: Settings, folder: Path) -> list[str]:
    """A message for each import and each file that the user's own code needs and the image lacks, with its remedy.

    Files are looked for in the working `folder` and beside the module that names them.
    """
    own = {path.local for path in own_package()}
    sources = sorted({source for path in plan.local_paths if path.local not in own for source in _sources(path.local)})
    copied = {PurePosixPath(path.remote).name.removesuffix(".py") for path in plan.local_paths}
    commands = " ".join(plan.run_commands)
    installed = _with_dependencies([*plan.requirements, *re.findall(r"[\w.-]+", commands), "modal"])
    owners = metadata.packages_distributions()
    trees = [(source, tree) for source in sources if (tree := _parsed(source)) is not None]
    gaps: dict[str, str] = {}
    for source, tree in trees:
        for name in _imports(tree):
            if name not in copied and name != "modalkit" and name not in sys.stdlib_module_names:
                gaps.setdefault(f"import {name}", _missing_import(name, source.name, installed, owners, folder))
    files = [(name, source.name, source.parent) for source, tree in trees for name in _names_of_files(tree)]
    for model, entry in settings.model_settings.model_entries.items():
        texts = [value for value in entry.arguments().values() if isinstance(value, str)]
        files += [(text, f"model_settings.model_entries.{model}", folder) for text in texts]
    for name, user, beside in files:
        found = _found(name, beside, folder)
        if found is not None and not _is_copied(found[0], plan):
            gaps.setdefault(f"file {found[0]}", _missing_file(*found, user, settings, folder))
    return [gap for gap in gaps.values() if gap]


def _sources(path: Path) -> Iterator[Path]:
    """The Python files at a path of the image; not those in an environment or in hidden folders."""
    if path.is_dir():
        for source in path.rglob("*.py"):
            if not any(part.startswith(".") or part == "site-packages" for part in source.relative_to(path).parts):
                yield source
    elif path.suffix == ".py":
        yield path


def _parsed(source: Path) -> ast.Module | None:
    try:
        return ast.parse(source.read_bytes())
    except (OSError, RecursionError, SyntaxError, ValueError):
        return None  # the import of it says what is wrong


def _imports(tree: ast.AST) -> Iterator[str]:
    """The top-level names that are imported, but for those that the code can do without."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module is not None and node.level == 0:
                yield node.module.partition(".")[0]
        elif not isinstance(node, ast.expr) and not _is_optional(node):
            yield from _imports(node)


def _is_optional(node: ast.AST) -> bool:
    """Whether imports in it may fail, or are for type checkers only."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    caught = [handler.type for handler in node.handlers] if isinstance(node, ast.Try) else []
    return any(
        kind is None or any(isinstance(part, ast.Name) and part.id in _IMPORT_FAILURES for part in ast.walk(kind))
        for kind in caught
    )


def _names_of_files(tree: ast.AST) -> Iterator[str]:
    """Texts that may name a file, those that a path is put together of included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            yield "/".join(_last_texts(_operands(node)))
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            yield "/".join(_last_texts(node.args))


def _operands(node: ast.expr) -> list[ast.expr]:
    is_joined = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
    return [*_operands(node.left), node.right] if isinstance(node, ast.BinOp) and is_joined else [node]


def _last_texts(nodes: Sequence[ast.expr]) -> list[str]:
    """The texts at the end of a path: ``data`` and ``a.txt`` of ``HERE / "data" / "a.txt"``."""
    texts: list[str] = []
    for node in reversed(nodes):
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            break
        texts.insert(0, node.value)
    return texts


def _found(name: str, beside: Path, folder: Path) -> tuple[Path, bool] | None:
    """The file of that name, if there is one below the folder, and whether it is in the working folder."""
    if not name or len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
        return None
    for start, is_in_folder in ((folder, True), (beside, False)):
        with suppress(OSError):  # a text that is no name of a file, or a folder of another user
            file = (start / name).resolve()
            if file.is_relative_to(folder.resolve()) and file.suffix != ".py" and file.is_file():
                return file, is_in_folder
    return None


def _is_copied(file: Path, plan: ImagePlan) -> bool:
    return any(file.is_relative_to(path.local.resolve()) for path in plan.local_paths)


def _missing_file(file: Path, is_in_folder: bool, user: str, settings: Settings, folder: Path) -> str:
    local = file.relative_to(folder.resolve()).as_posix()
    start = settings.app_settings.build_config.workdir if is_in_folder else SOURCE_FOLDER
    return (
        f"{user} names the file {local}, which the image does not have; if it is read there, add it to "
        f"app_settings.deployment_config.mounts: {{local_path: {local}, remote_path: {in_container(local, start)}}}"
    )


def _missing_import(
    name: str, user: str, installed: set[str], owners: Mapping[str, Sequence[str]], folder: Path
) -> str:
    """The message for a module, or an empty text if the image has it; `owners` has the distributions of modules."""
    distributions = owners.get(name, [])
    if any(canonicalize_name(distribution) in installed for distribution in distributions or [name]):
        return ""
    if not distributions:
        if find_top_module(name, folder) is not None:
            return (
                f"{user} imports {name}, a module of yours that the image does not have; add it to "
                f"app_settings.build_config.python_modules: [{name}]"
            )
        return (
            f"{user} imports {name}, which is not installed here, so its package is not known; unless the image has "
            "it, add to app_settings.build_config.extra_run_commands: pip install <the package>"
        )
    pinned = f"{distributions[0]}=={metadata.version(distributions[0])}"
    return (
        f"{user} imports {name}, which the image does not have unless its base does; add to "
        f"app_settings.build_config.extra_run_commands: pip install {pinned}"
    )


def _with_dependencies(requirements: Iterable[str]) -> set[str]:
    """The names of distributions, and of those that they need, as far as they are installed here."""
    waiting = [Requirement(requirement) for requirement in requirements if _is_requirement(requirement)]
    names: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in names or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        names.add(name)
        try:
            waiting += [Requirement(line) for line in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
    return names


def _is_requirement(text: str) -> bool:
    try:
        Requirement(text)
    except ValueError:
        return False
    return True
