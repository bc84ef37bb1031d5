from tests.train.conftest import *
from tests.train.conftest import apart
L=[63,2,1,0,40,63,0,3, 63,63,20,10,5,7,63,1]
def test_a(phases, plain):
    specs=[{"labels":L,"stage":s} for s in (2,3)]
    import time
    t=time.time()
    (ref,w),=plain(specs[0]); print("plain",ref,time.time()-t)
    first=w
    for ranks in (1,2):
        t=time.time()
        for got in phases(*specs,{"labels":L,"training":{"gradient_checkpointing":False}},{"labels":L,"instead":["unseeded"]},{"labels":L,"instead":["mean of means"]}, ranks=ranks):
            print(ranks,got.losses,apart(got.weights,w),max(abs(a-b) for a,b in zip(got.losses,ref)))
            print([(x["step"],x["learning_rate"]) for x in got.lines], [(m["step"],m["dataset"],m["eval_loss"],m["tokens"]) for m in got.measured], got.failed, got.told[:9] if ranks==1 else "")
        print(time.time()-t)
