"""Where the videos of MVBench (arXiv 2311.17005) lie."""

from __future__ import annotations

__all__ = ["MVBENCH", "MVBENCH_RATE"]

#: Frames per second of the folders of frames in it (tvqa/frames_fps3_hq), which its authors read at that rate.
MVBENCH_RATE = 3.0
#: Where MVBench (arXiv 2311.17005) keeps the videos of a task, below video/.
MVBENCH = {
    "star/Charades_v1_480": ("action_sequence", "action_prediction", "object_interaction"),
    "ssv2_video": ("action_antonym",),
    "Moments_in_Time_Raw/videos": ("fine_grained_action",),
    "FunQA_test/test": ("unexpected_action",),
    "clevrer/video_validation": (
        "object_existence", "moving_direction", "moving_count", "moving_attribute", "counterfactual_inference",
    ),
    "perception/videos": ("object_shuffle", "action_count", "state_change", "character_order"),
    "sta/sta_video": ("action_localization",),
    "scene_qa/video": ("scene_transition",),
    "nturgbd": ("fine_grained_pose",),
    "vlnqa": ("egocentric_navigation",),
    "tvqa/frames_fps3_hq": ("episodic_reasoning",),
}  # fmt: skip
