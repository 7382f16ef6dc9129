"""From files, standard input and Hub data sets to noised batches."""
