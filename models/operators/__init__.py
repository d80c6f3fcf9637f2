"""Every formula of fusion once, as pure functions on tensors or blocks; no file and no model.

    election      TIES' sign election and disjoint merge; SCE's, PEFT's and the masks' variants
    drop          DARE's drop, DELLA's keep probabilities
    selection     exactly the k largest magnitudes: of a tensor, over blocks, over a model; PEFT's variant
    low_rank      changes B A: product, inner product, norms, the nearest of a rank
    core_space    the small space that several of them share
    noise         counted draws: functions of key and index alone
    dense sparse  the merges made of these, over blocks (blocks, spans)
    parameters    what a merge takes beside tensors; declared: how such parameters are named, typed and checked

``density`` is the share that is kept, everywhere. A trailing underscore marks what overwrites its inputs, as in torch.
"""
