"""Read the library's public names from its source: parameters with the comments beside them, fields, methods.

Nothing is imported, so types and defaults are shown as written.
"""
import ast
import io
import tokenize
from dataclasses import dataclass, field

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Parameter:
    """A parameter, a field, or the return value of a function."""
    name: str
    type: str = ""
    default: str = ""
    details: str = ""


@dataclass
class Entry:
    """A public function, class or method."""
    name: str
    kind: str  # function, class, exception, method or property
    line: int
    text: str  # the docstring
    parameters: list[Parameter] = field(default_factory=list)
    returns: Parameter | None = None
    methods: list["Entry"] = field(default_factory=list)

    @property
    def signature(self):
        """Return names and defaults; the types are in the table."""
        return ", ".join(p.name + (f"={p.default}" if p.default else "") for p in self.parameters)

    @property
    def summary(self):
        """Return the first paragraph of the docstring."""
        return self.text.strip().split("\n\n")[0].replace("\n", " ")


def trailing_comments(source):
    """Return the comment of each line that has one, without the number sign."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT and not token.string.startswith("#|")]
    return {token.start[0]: token.string.lstrip("#").strip() for token in comments}


def text_of(node): return "" if node is None else ast.unparse(node)


def arguments_of(function):
    """Return (argument or None, name, default or None) for each parameter, in order."""
    a = function.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
    found = [(arg, arg.arg, default) for arg, default in zip(positional, defaults)]
    if a.vararg: found.append((a.vararg, f"*{a.vararg.arg}", None))
    elif a.kwonlyargs: found.append((None, "*", None))
    found += [(arg, arg.arg, default) for arg, default in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: found.append((a.kwarg, f"**{a.kwarg.arg}", None))
    return found


def parameters_of(function, comments):
    """Return the parameters. A comment belongs to the last parameter on its line, as in nbdev."""
    found = arguments_of(function)
    last_on_line = {arg.lineno: name for arg, name, _ in found if arg}
    def details(arg, name): return comments.get(arg.lineno, "") if arg and last_on_line[arg.lineno] == name else ""
    return [Parameter(name, text_of(arg and arg.annotation), text_of(default), details(arg, name))
            for arg, name, default in found if name not in ("self", "cls")]


def returns_of(function, comments):
    if function.returns is None: return None
    return Parameter("", text_of(function.returns), "", comments.get(function.returns.end_lineno, ""))


def kind_of(function):
    decorators = {text_of(decorator).split(".")[-1] for decorator in function.decorator_list}
    return "property" if decorators & {"property", "cached_property"} else "method"


def function_entry(node, comments, kind="function"):
    text = ast.get_docstring(node) or ""
    return Entry(node.name, kind, node.lineno, text, parameters_of(node, comments), returns_of(node, comments))


def is_text(node):
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return constant and isinstance(node.value.value, str)


def is_dataclass(node):
    return any(text_of(decorator).partition("(")[0] in ("dataclass", "dataclasses.dataclass")
               for decorator in node.decorator_list)


def fields_of(node, comments, classes):
    """Return the fields of a dataclass or named tuple: those of its base dataclasses in `classes`, then its own.

    As in Python, a field that is defined again keeps its place and gets the new default.
    """
    fields = {parameter.name: parameter for parameter in inherited_fields(node, comments, classes)}
    fields |= {parameter.name: parameter for parameter in own_fields(node, comments)}
    return list(fields.values())


def inherited_fields(node, comments, classes):
    """Return the fields that a class inherits from dataclasses in `classes`, the class definitions of its module."""
    bases = [classes[name] for base in reversed(node.bases) if (name := text_of(base)) in classes]
    return [field for base in bases
            for field in (fields_of if is_dataclass(base) else inherited_fields)(base, comments, classes)]


def own_fields(node, comments):
    """Return the fields that a class defines itself, with the comment beside them or the string below."""
    below = {id(a): b.value.value for a, b in zip(node.body, node.body[1:]) if is_text(b)}
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    return [Parameter(item.target.id, text_of(item.annotation), default_of(item.value),
                      below.get(id(item)) or comments.get(item.end_lineno, ""))
            for item in fields if not text_of(item.annotation).startswith("ClassVar")]


def default_of(value):
    """Return a field's default, also from a call: `field(default_factory=list)`, `bounded(default=0.1)`."""
    if not isinstance(value, ast.Call): return text_of(value)
    named = {keyword.arg: text_of(keyword.value) for keyword in value.keywords}
    if "default" in named: return named["default"]
    return f"{named['default_factory']}()" if "default_factory" in named else text_of(value)


def class_entry(node, comments, classes):
    """Return the entry of a class. `classes` are the class definitions of its module, by name."""
    functions = {item.name: item for item in node.body if isinstance(item, FUNCTION)}
    start, bases = functions.get("__init__"), {text_of(base) for base in node.bases}
    parameters = parameters_of(start, comments) if start else fields_of(node, comments, classes)
    public = [item for name, item in functions.items() if not name.startswith("_") and ast.get_docstring(item)]
    methods = [function_entry(item, comments, kind_of(item)) for item in public]
    kind = "exception" if bases & {"Exception", "ValueError", "RuntimeError"} else "class"
    text = ast.get_docstring(node) or (ast.get_docstring(start) if start else "") or ""
    return Entry(node.name, kind, node.lineno, text, parameters, None, methods)


@dataclass
class Module:
    """A module and its public names."""
    name: str
    text: str  # the docstring
    entries: dict[str, Entry]
    constants: list[str]  # public names without a docstring of their own


def public_names(tree):
    lists = [item for item in tree.body if isinstance(item, ast.Assign) and text_of(item.targets[0]) == "__all__"]
    return ast.literal_eval(lists[0].value) if lists else []


def read_module(path):
    """Return the functions and classes that a file exports, in the order of the file."""
    source = path.read_text()
    tree, comments = ast.parse(source), trailing_comments(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    public, entries = public_names(tree), {}
    for node in tree.body:
        if getattr(node, "name", None) not in public: continue
        if isinstance(node, ast.ClassDef): entries[node.name] = class_entry(node, comments, classes)
        if isinstance(node, FUNCTION): entries[node.name] = function_entry(node, comments)
    constants = [name for name in public if name not in entries]
    return Module(f"kdcode.{path.stem}", ast.get_docstring(tree) or "", entries, constants)
