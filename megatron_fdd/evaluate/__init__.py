"""The evaluation of exported (Hugging Face) students: answers to instructions, perplexity, distance to the teacher.

In reading order: `named_path` and `request` (what a command asks for), `data_file` (instructions), `models`
(loading), `generation` (prompts and answers), `answers` (the file with which a killed run continues), `rouge`,
`perplexity` (texts), `evaluation` (all of it, model by model), `results` and `table` (what is written and printed).
The folder `report` shows several runs side by side on one page.
"""
