"""Which form the rows of a data file have: the `dataset_format` that LLaMA-Factory needs to read them."""

from typing import Any

from selection.run.errors import UserError

DEFAULT_TAGS = {  # LLaMA-Factory's, for sharegpt
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_DEFAULT_COLUMNS = (
    {"prompt": "instruction", "query": "input", "response": "output"},
    {"messages": "conversations"},
)
_TEXT_COLUMNS = (("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"))


def detect_form(columns: list[str], rows: list[dict], source: str) -> tuple[dict[str, Any], list[str]]:
    """How LLaMA-Factory has to read these rows: keys of `dataset_format`, and the columns that this uses.

    Knows conversations of from/value or role/content messages (columns conversations, messages) and text columns.
    Raises: UserError naming the columns where none of these fits.
    """
    for column in ("messages", "conversations"):
        if column in columns and (form := _conversation(column, rows, source)):
            return _with_system(form, columns)
    for prompt, response in _TEXT_COLUMNS:
        if {prompt, response} <= set(columns) and not any(isinstance(row[prompt], list | dict) for row in rows):
            names = {"prompt": prompt, "query": "input", "response": response}
            if "input" not in columns:
                del names["query"]
            return _with_system({"formatting": "alpaca", "columns": names}, columns)
    pairs = ", ".join(f"{prompt} and {response}" for prompt, response in _TEXT_COLUMNS)
    raise UserError(
        f"--data {source}: its columns ({', '.join(columns)}) are of no known form ({pairs}, or a conversation in "
        "messages or conversations): say what they are called, e.g. --set dataset_format.columns.prompt=… --set "
        "dataset_format.columns.response=…"
    )


def _conversation(column: str, rows: list[dict], source: str) -> dict[str, Any] | None:
    """The form of a column of messages; None where it holds something else.

    role/content is read as LLaMA-Factory's sharegpt with other tags: its "openai" would add a sentence to every
    system prompt.
    """
    messages = [message for row in rows for message in (row[column] if isinstance(row[column], list) else [None])]
    for role, content in (("from", "value"), ("role", "content")):
        if messages and all(isinstance(m, dict) and {role, content} <= set(m) for m in messages):
            break
    else:
        return None
    roles = {str(message[role]) for message in messages}
    known = ({"user", "human"}, {"assistant", "gpt"}, {"observation", "tool"}, {"function_call"}, {"system"})
    names = ("user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
    default = DEFAULT_TAGS if role == "from" else DEFAULT_TAGS | {"user_tag": "user", "assistant_tag": "assistant"}
    tags = {"role_tag": role, "content_tag": content}
    for name, words in zip(names, known, strict=True):
        found = sorted(words & roles)
        tags[name] = found[0] if len(found) == 1 else default[name]
        roles -= {tags[name]}
    if roles or any(message.get("tool_calls") for message in messages):
        what = f"roles {', '.join(sorted(roles))}" if roles else "tool_calls"
        raise UserError(f"--data {source}: {column} has {what}: say how to read it, with --set dataset_format.…")
    return {"formatting": "sharegpt", "columns": {"messages": column}, "tags": tags}


def _with_system(form: dict[str, Any], columns: list[str]) -> tuple[dict[str, Any], list[str]]:
    """With a system column where there is one; without what LLaMA-Factory supposes anyway."""
    if "system" in columns:
        form["columns"]["system"] = "system"
    used = list(form["columns"].values())
    if form["columns"] in _DEFAULT_COLUMNS:
        del form["columns"]
    if form.get("tags") == DEFAULT_TAGS:
        del form["tags"]
    return form, used
