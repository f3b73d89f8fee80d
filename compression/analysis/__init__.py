"""How far a workload can be compressed: curves of quality over size, their knees, and the layers that suffer most.

`measure.analyze` measures, `findings.findings` says it in three sentences, `charts` and `page` show it, `cli` is the
command. Nothing is imported here, so that the command line starts quickly.
"""
