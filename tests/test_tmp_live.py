import pytest, torch
from conftest import relative_error
from simba import ops
from simba.ops import naive
from test_ops import double, scan_inputs
pytestmark = pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("d_state",[3,16,24])
@pytest.mark.parametrize("dtype",[torch.float32, torch.bfloat16])
def test_live(d_state, dtype, monkeypatch):
    monkeypatch.setattr("simba.ops.triton.scan.MIN_CHUNK", 8)
    i = scan_inputs(2, 37, 20, d_state, dtype)
    rows = torch.tensor([[-1,-1, 0, 5, 6, 7, 8, 36], [1, 2, 3, 4, 20, 21, 34, 35]])
    z = torch.randn(2, 8, 20).to(dtype)
    h0 = torch.randn(2,20,d_state)
    y, state = ops.selective_scan(*(i[n] for n in ("x","dt","A","B","C","D")), dt_bias=i["dt_bias"], rows=rows, z_rows=z, initial_state=h0, backend="triton")
    e = double(i); 
    ey, es = naive.selective_scan(*(e[n] for n in ("x","dt","A","B","C","D")), dt_bias=e["dt_bias"], rows=rows, initial_state=h0.double())
    ey = ey*naive.silu(z.double())
    assert (y[rows<0]==0).all()
    assert relative_error(state, es) < 1e-5
    assert relative_error(y, ey) < (1e-5 if dtype==torch.float32 else 1e-2)
from test_families import ssd_inputs
@pytest.mark.parametrize("backend,dtype",[("torch",torch.float64),("torch",torch.float32),("triton",torch.float32),("triton",torch.bfloat16)])
def test_ssd(backend, dtype):
    i = ssd_inputs(260, dtype, 2, 4, 24, 2, 16)
    rows = torch.tensor([[-1,-1, 0, 5, 6, 7, 8, 259], [1, 2, 3, 4, 20, 70, 71, 75]])
    kinds=[rows, torch.arange(260).expand(2,-1)]
    for rows in kinds:
        y, state = ops.ssd_scan(**i, rows=rows, backend=backend)
        e = {k: v.double() for k, v in i.items()}
        ey, es = naive.ssd_scan(**e, rows=rows)
        assert (y[rows<0]==0).all()
        tol = {torch.float64:1e-12, torch.float32:1e-5, torch.bfloat16:1e-2}[dtype]
        assert relative_error(state, es) < tol
        assert relative_error(y, ey) < tol
