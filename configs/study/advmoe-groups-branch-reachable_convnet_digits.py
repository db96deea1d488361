_base_ = 'advmoe-groups-branch_convnet_digits.py'

# Experts also learn from the images that an attack can send them: it tries each route, the routers decide.
model = dict(
    route='free',
    data_preprocessor=dict(
        attack=dict(_delete_=True, type='RoutePGD', eps=0.1, alpha=0.05, steps=4, stop_at_first=False),
    ),
)
