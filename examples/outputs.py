"""What the examples write: files that are whole or not there, and checkpoints to go on from."""

import os
import zipfile

import distributed
import torch
from common import InputError


def prepare_output(path):
    """Create the folder of path, and find out now whether path can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the folder {path.parent}: {error.strerror}") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write {path}: it is a folder, or lies in one that is read-only")


def write_atomically(path, write):
    """Call write(file) on a temporary file that then takes path's place, never half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot write {path} ({reason}); what was there is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


class Checkpoint:
    """Where a training is saved, and with args.resume, continued from.

    kind names the example. settings are values of its own that must be the same when the training
    goes on; the common options are added to them. A resume that fails writes nothing.
    """

    SAME = ("cell", "layers", "hidden", "batch", "lr", "clip", "seed", "no_compare")

    def __init__(self, args, kind, settings, learners):
        self.path, self.kind, self.learners = args.checkpoint, kind, learners
        self.settings = {name: getattr(args, name) for name in self.SAME} | settings
        if args.resume:
            self.resume(args.device)
        for path in (args.checkpoint, args.plot):
            prepare_output(path)

    def save(self):
        learners = {name: learner.state_dict() for name, learner in self.learners.items()}
        contents = {"kind": self.kind, "settings": self.settings, "learners": learners}
        contents["rng"] = torch.get_rng_state()
        if distributed.rank() == 0:
            write_atomically(self.path, lambda file: torch.save(contents, file))

    def resume(self, device):
        """Put the learners where the file left them. No code in it is run (weights_only)."""
        if not self.path.is_file():
            raise InputError(f"there is no checkpoint {self.path}; train once without --resume")
        damaged = InputError(f"{self.path} is damaged or no checkpoint; train without --resume")
        try:
            if zipfile.ZipFile(self.path).testzip():  # torch.load itself checks no checksum
                raise damaged
            contents = torch.load(self.path, map_location=device, weights_only=True)
        except PermissionError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from None
        except Exception:  # zipfile, pickle and torch between them raise nearly anything
            raise damaged from None
        if not isinstance(contents, dict) or contents.get("kind") != self.kind:
            raise InputError(f"{self.path} is no checkpoint of this example; give another one")
        try:
            for name, value in self.settings.items():
                self.require_same(name, contents["settings"][name], value)
            for name, learner in self.learners.items():
                learner.load_state_dict(contents["learners"][name])
            torch.set_rng_state(contents["rng"].cpu())
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            raise damaged from None

    def require_same(self, name, saved, value):
        if saved != value:
            difference = f"with {name.replace('_', '-')} {saved}, not {value}"
            if isinstance(value, str) and len(value) > 20:  # a digest or a vocabulary
                difference = f"with another {name}"
            raise InputError(f"{self.path} was trained {difference}; train without --resume")
