"""Where rows come from and what they become: sources, columns, conversations, collators."""
