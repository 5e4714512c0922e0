"""``python -m hybrid_predict_trainer.cli``."""

from . import main

if __name__ == "__main__":
    raise SystemExit(main())
