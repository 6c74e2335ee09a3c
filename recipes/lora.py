"""Train one LoRA of MiniLM per text task into the cache, for `lora.yaml` to merge; two have rank 16, two rank 4.

python recipes/lora.py               # all four tasks
python recipes/lora.py polarity      # one of them
python recipes/lora.py --model out/  # accuracies of a repo merged by lora.yaml
"""

from adapters import workbench

if __name__ == "__main__":
    workbench("lora", __doc__).main()
