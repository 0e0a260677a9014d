"Where models and rows come from."
