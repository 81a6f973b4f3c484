"""What the library's modules offer, read from their source: names, parameters with the comments that stand beside them, methods.

Nothing is imported, so types and defaults are shown as they were written.
"""
import ast
import io
import tokenize
from dataclasses import dataclass, field


@dataclass
class Parameter:
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
        """Names and defaults; types stand in the table."""
        return ", ".join(p.name + (f"={p.default}" if p.default else "") for p in self.parameters)

    @property
    def summary(self):
        return self.text.strip().split("\n\n")[0].replace("\n", " ")


def trailing_comments(source):
    """The comment on each line that has one, without its sign."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("#").strip() for token in tokens if token.type == tokenize.COMMENT and not token.string.startswith("#|")}


def text_of(node): return "" if node is None else ast.unparse(node)


def parameters_of(function, comments):
    """A comment belongs to the last parameter on its line, as nbdev has it."""
    a = function.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    found = [(arg, arg.arg, default) for arg, default in zip(plain, defaults)]
    if a.vararg: found.append((a.vararg, f"*{a.vararg.arg}", None))
    elif a.kwonlyargs: found.append((None, "*", None))
    found += [(arg, arg.arg, default) for arg, default in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: found.append((a.kwarg, f"**{a.kwarg.arg}", None))
    last_on_line = {arg.lineno: name for arg, name, _ in found if arg}
    return [Parameter(name, text_of(arg and arg.annotation), text_of(default), comments.get(arg.lineno, "") if arg and last_on_line[arg.lineno] == name else "")
            for arg, name, default in found if name not in ("self", "cls")]


def returns_of(function, comments):
    if function.returns is None: return None
    return Parameter("", text_of(function.returns), "", comments.get(function.returns.end_lineno, ""))


def kind_of(function):
    decorators = {text_of(decorator).split(".")[-1] for decorator in function.decorator_list}
    return "property" if decorators & {"property", "cached_property"} else "method"


def function_entry(node, comments, kind="function"):
    return Entry(node.name, kind, node.lineno, ast.get_docstring(node) or "", parameters_of(node, comments), returns_of(node, comments))


def fields_of(node, comments):
    """Fields of a dataclass or a named tuple: with the comment beside them, or the text below."""
    following = {id(a): b.value.value for a, b in zip(node.body, node.body[1:]) if isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant) and isinstance(b.value.value, str)}
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and not text_of(item.annotation).startswith("ClassVar")]
    return [Parameter(item.target.id, text_of(item.annotation), default_of(item.value), following.get(id(item)) or comments.get(item.end_lineno, "")) for item in fields]


def default_of(value):
    """A field's default, also where a helper holds it beside other things: within(0, 1, default=0.1), field(default_factory=list)."""
    if not isinstance(value, ast.Call): return text_of(value)
    named = {keyword.arg: text_of(keyword.value) for keyword in value.keywords}
    return named.get("default") or (f"{named['default_factory']}()" if "default_factory" in named else text_of(value))


def class_entry(node, comments):
    functions = {item.name: item for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))}
    start, bases = functions.get("__init__"), {text_of(base) for base in node.bases}
    parameters = parameters_of(start, comments) if start else fields_of(node, comments)
    methods = [function_entry(item, comments, kind_of(item)) for name, item in functions.items() if not name.startswith("_") and ast.get_docstring(item)]
    kind = "exception" if bases & {"Exception", "ValueError", "RuntimeError"} else "class"
    return Entry(node.name, kind, node.lineno, ast.get_docstring(node) or (ast.get_docstring(start) if start else "") or "", parameters, None, methods)


@dataclass
class Module:
    name: str
    text: str
    entries: dict[str, Entry]
    constants: list[str]  # public names without a docstring of their own


def read_module(path):
    """The functions and classes that a file exports, in its order."""
    source = path.read_text()
    tree, comments = ast.parse(source), trailing_comments(source)
    public = next((ast.literal_eval(item.value) for item in tree.body if isinstance(item, ast.Assign) and text_of(item.targets[0]) == "__all__"), [])
    entries = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in public: entries[node.name] = class_entry(node, comments)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name in public: entries[node.name] = function_entry(node, comments)
    return Module(f"kdcode.{path.stem}", ast.get_docstring(tree) or "", entries, [name for name in public if name not in entries])
