"Tasks, training, evaluation and the loop over a sequence of tasks."
