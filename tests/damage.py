"""Random damages of a JSON file."""

import json
import random
import re

OTHERS = (None, True, -1, 2.5, "x", [], {}, [1], {"rows": 1}, 1 << 70)


def damaged(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """(bytes of a damaged file, the key that was changed or "")."""
    how = rng.choice(("delete", "type", "rename", "cut", "digit", "bit"))
    if how == "cut":
        return content[: rng.randrange(len(content))], ""
    if how == "digit":
        at = rng.choice([m.start() for m in re.finditer(rb"\d", content)])
        return content[:at] + bytes([48 + (content[at] - 48 + rng.randrange(1, 10)) % 10]) + content[at + 1 :], ""
    if how == "bit":
        at = rng.randrange(len(content))
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :], ""
    known = json.loads(content)
    places = []

    def walk(at):
        for key, value in at.items() if isinstance(at, dict) else enumerate(at):
            places.append((at, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(known)
    at, key = rng.choice(places)
    if how == "type":
        at[key] = rng.choice([other for other in OTHERS if other != at[key]])
    elif how == "delete" or isinstance(at, list):
        del at[key]
    else:
        at[f"{key}_"] = at.pop(key)
    return json.dumps(known).encode(), str(key)
