"""Generation of the code for the protobuf messages and services.

    python -m server.rpc.generate

The output is checked in, so that a server can be installed without a compiler for protobuf.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"
GENERATED = Path(__file__).parent / "generated"

# protoc derives Python packages from the path of a proto file below protos/. The generated code is
# put into a package of the server instead, so that there is no top-level package ``fathom``.
_IMPORT = re.compile(r"^from fathom\.", flags=re.MULTILINE)
_IMPORT_BELOW_SERVER = "from server.rpc.generated.fathom."


def generate(directory: Path) -> list[Path]:
    """Write the code for every file below ``protos/`` to ``directory``; return what was written.

    Raises :class:`RuntimeError` if protoc refuses a file; protoc says why on stderr.
    """
    protos = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as temporary:
        options = [f"--{kind}={temporary}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
        if protoc.main(["protoc", f"--proto_path={PROTOS}", *options, *protos]) != 0:
            raise RuntimeError(f"protoc refused the files below {PROTOS}")
        written = []
        for source in sorted(Path(temporary).rglob("*.py*")):
            target = directory / source.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_IMPORT.sub(_IMPORT_BELOW_SERVER, source.read_text()))
            written.append(target)
    for package in {parent for path in written for parent in path.parents}:
        if package == directory or directory in package.parents:
            (package / "__init__.py").touch()
            written.append(package / "__init__.py")
    return sorted(written)


if __name__ == "__main__":
    for path in generate(GENERATED):
        print(path.relative_to(ROOT))
