"""A model that is split by whole layers: processes that hold a part each pass a step's sequences on to one another.

The processes of a run form rows of ``stages`` each. A row holds the model once; several rows are replicas that share
the slices of a step. The layers are split into chunks of consecutive ones, dealt to the stages in turn, so a stage may
hold several chunks that do not follow one another: the passes of a step then wait less for one another. Which process
computes a layer never changes what it computes, so neither the number of stages nor that of chunks changes a run.

Each process needs the weights of its own layers alone. A folder is read by name, so no more is read than that. Of a
model in memory other layers may lie on ``meta``; where they do not, they are given up. After the run the trajectory's
model has these layers too.
"""
