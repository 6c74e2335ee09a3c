"""Train one (IA)³ adapter of MiniLM per text task into the cache, for `ia3.yaml` to merge.

python recipes/ia3.py               # all four tasks
python recipes/ia3.py polarity      # one of them
python recipes/ia3.py --model out/  # accuracies of a repo merged by ia3.yaml
"""

from adapters import workbench

if __name__ == "__main__":
    workbench("ia3", __doc__).main()
